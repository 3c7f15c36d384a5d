"""The weight of the adversarial loss against the published formulas, computed by PyTorch's autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.losses.adversarial import adaptive_weight
from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.tasks.adversarial import AdversarialConfig, AdversarialLoss

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SIDE = 6
IVIDEOGPT = AdversarialConfig(weight=0.8, norm_epsilon=0.0, norm_floor=1e-8)
# How strong the discriminator's gradient is: the first is not limited, the others are.
STRENGTHS = (1.0, 1e-4, 1e-9, 0.0)


def published(strength: float, kind: str) -> tuple[np.ndarray, float, list[np.ndarray]]:
    """Gradient of the last kernel under the published loss, its adaptive weight, gradients of both parts as means.

    "sum" is the loss of Stable Diffusion's autoencoder and CV-VAE (`LPIPSWithDiscriminator`), "mean" iVideoGPT's.
    """
    random = np.random.default_rng(0)
    kernel = torch.tensor(random.normal(size=(3, 4)), requires_grad=True)  # of a 1x1 convolution
    features, image = (torch.tensor(random.normal(size=(2, c, SIDE, SIDE))) for c in (4, 3))
    made = torch.einsum("oc,bchw->bohw", kernel, features)
    error = torch.abs(made - image)
    reconstruction = torch.sum(error) / error.shape[0] if kind == "sum" else torch.mean(error)
    adversarial = -torch.mean(strength * torch.tanh(made))
    pulled, pushed = (torch.autograd.grad(loss, kernel, retain_graph=True)[0] for loss in (reconstruction, adversarial))
    if kind == "sum":
        weight = torch.clamp(torch.norm(pulled) / (torch.norm(pushed) + 1e-4), 0.0, 1e4) * 0.5
    else:
        weight = torch.clamp(torch.norm(pulled) / torch.norm(pushed).clamp(min=1e-8), max=1e4) * 0.8
    total = torch.autograd.grad(reconstruction + weight * adversarial, kernel)[0]
    values = 3 * SIDE * SIDE if kind == "sum" else 1
    return total.numpy(), float(weight), [pulled.numpy() / values, pushed.numpy()]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_weight_has_the_published_effect(kind, strength):
    """With a loss that is a mean the gradient is the published one up to a common factor, limited or not."""
    config = AdversarialConfig(weight=0.5, limit_of="sum") if kind == "sum" else IVIDEOGPT
    total, weight, (pulled, pushed) = published(strength, kind)
    ours = config.weight * adaptive_weight(
        jnp.asarray(pulled), jnp.asarray(pushed), limit=config.limit_for(SIDE, SIDE), epsilon=config.norm_epsilon,
        floor=config.norm_floor,
    )  # fmt: skip
    values = 3 * SIDE * SIDE if kind == "sum" else 1
    assert float(ours) * values == pytest.approx(weight, rel=1e-5)
    np.testing.assert_allclose(values * (pulled + float(ours) * pushed), total, rtol=1e-5, atol=1e-7)
    assert (weight / config.weight == pytest.approx(1e4)) == (strength < 1), "the cases are on both sides of the limit"


def test_the_loss_uses_the_limit_of_its_config():
    """A decoder whose adversarial gradient vanishes gets the largest weight: 1e4 for means, 1e4 / 3HW for sums."""
    clips = [jnp.zeros((1, 1, 8, 8, 3))]

    def weight(**changes):
        network = ClipDiscriminatorConfig(width=4, halvings=0, groups=2)
        loss = AdversarialLoss(AdversarialConfig(network=network, weight=1.0, **changes))
        discriminator = jax.jit(loss.network.init)(jax.random.key(0))
        gradients = iter((jnp.full((3, 3), 1e8), jnp.zeros((3, 3))))
        run = jax.jit(lambda network: loss.generator_loss(network, {}, clips, clips, lambda _: next(gradients))[0])
        return float(run(discriminator))

    assert weight() == pytest.approx(1e4)
    assert weight(limit_of="sum") == pytest.approx(1e4 / 192)
    assert weight(norm_epsilon=0.0, norm_floor=1e8, limit=7.0) == pytest.approx(3.0)

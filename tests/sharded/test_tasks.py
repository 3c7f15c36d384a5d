"""The real tasks on eight host devices: loss and gradients are those of one device, whatever the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.lora import LoraConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import ShardingConfig
from jvgen.tasks.image_vae import ImageVAETaskConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.step import STEP

VIDEO = TextToVideoConfig(
    denoiser=VideoDiTConfig(
        layers=2, heads=4, head_width=16, in_channels=4, out_channels=4, text_width=16, text_length=7,
        condition_width=16, remat=Remat.SAVE_ATTENTION, token_multiple=8,
    ),
    text=TextConfig(encoder=ByteTextConfig(width=16, layers=1, heads=2), length=7),
    schedule=ScheduleConfig(kind="cogvideox"),
    objective=ObjectiveConfig(target="v"),
    temporal_compression=4,
)  # fmt: skip
IMAGE = ImageVAETaskConfig(
    network=ImageVAEConfig.tiny().replace(
        block_channels=(8, 16), groups=4, mid_attention=True, quant_convolutions=True
    ),
    perceptual=PerceptualConfig(kind="laplacian", levels=2),
)
LORA = VIDEO.replace(
    lora=LoraConfig(rank=4, dropout=0.5, targets=("denoiser/", "text_encoder/")),
    denoiser_weights="w", text_encoder_weights="w",
)  # fmt: skip
TASKS = {
    "lora": (LORA, BucketConfig(frames=5, height=64, width=64, batch_size=8)),
    "video": (VIDEO, BucketConfig(frames=5, height=64, width=64, batch_size=8)),
    "image": (IMAGE, BucketConfig(frames=1, height=16, width=16, batch_size=8)),
}
ONE = {"fsdp": 1}
MESHES = {
    "fsdp-seq-tensor": {"fsdp": 2, "seq": 2, "tensor": 2},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "data-fsdp-seq": {"data": 2, "fsdp": 2, "seq": 2},
    "tensor": {"data": 2, "fsdp": 1, "tensor": 4},
    "seq": {"fsdp": 1, "data": 2, "seq": 4},
}


# Each device takes whole examples, and no tokens are split.
WHOLE = {"data": 1, "fsdp": 4, "seq": 2}


def program_of(name: str, mesh: dict[str, int]) -> tuple[Program, BucketConfig]:
    task, bucket = TASKS[name]
    data = DataConfig(sources=(SourceConfig(path="nowhere"),), buckets=(bucket,))
    config = MeshConfig(**mesh)
    experiment = Experiment(
        name=name, task=task, data=data, mesh=config, sharding=ShardingConfig(replicate_below=64),
        training=TrainingConfig(steps=1, precision=PrecisionConfig(compute_dtype="float32")),
    )  # fmt: skip
    devices = jax.devices()[:1] if mesh == ONE else None
    return Program.build(experiment, make_mesh(config, devices)), bucket


def loss_and_gradient(name: str, mesh: dict[str, int]):
    program, bucket = program_of(name, mesh)
    rng = np.random.default_rng(0)

    def draw(shape):
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return rng.standard_normal(shape.shape).astype(np.float32)
        return (np.arange(np.prod(shape.shape)).reshape(shape.shape) * 7 % 250).astype(shape.dtype)

    # Away from the start, where zeros in the last layers hide most gradients.
    parameters, frozen = (
        jax.device_put(jax.tree.map(lambda leaf: 0.1 * draw(leaf), tree), places)
        for tree, places in (
            (program.abstract.parameters, program.shardings.parameters),
            (program.abstract.frozen, program.shardings.frozen),
        )
    )
    abstract = program.abstract_batch(bucket)
    arrays = {field: draw(abstract[field]) for field in sorted(abstract)} | {"slot": np.arange(8, dtype=np.int32)}
    batch = {field: jax.device_put(value, abstract[field].sharding) for field, value in arrays.items()}

    batch[STEP] = jnp.zeros(8, jnp.int32)

    sharding = program.sharding_of(bucket) if mesh == WHOLE else program.sharding

    def loss(parameters, frozen, batch):
        with axes.partitioned(sharding):
            return program.task.loss(parameters, frozen, batch, jax.random.key(3))[0]

    places = (program.sharding.replicated, program.shardings.parameters)
    return jax.jit(jax.value_and_grad(loss), out_shardings=places)(parameters, frozen, batch)


@pytest.fixture(scope="module")
def on_one_device():
    return functools.cache(lambda name: loss_and_gradient(name, ONE))


CASES = [
    ("video", "whole"),
    ("video", "fsdp-seq-tensor"),
    ("image", "fsdp-seq-tensor"),
    ("lora", "fsdp-seq-tensor"),
] + [
    pytest.param(name, mesh, marks=pytest.mark.slow)
    for name, mesh in [("video", m) for m in list(MESHES)[1:]] + [("image", "data-fsdp"), ("image", "tensor")]
]


@pytest.mark.parametrize("name,mesh", CASES)
def test_loss_and_gradients_are_those_of_one_device(on_one_device, name, mesh):
    expected = on_one_device(name)
    loss, gradient = loss_and_gradient(name, MESHES.get(mesh, WHOLE))
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True))
    largest = max(float(jnp.abs(want).max()) for _, want in pairs)
    for got, want in pairs:
        # Gradients that are zero but for rounding (biases before a norm, of keys) need a floor.
        atol = max(1e-5 * float(jnp.abs(want).max()), 1e-6 * largest)
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)


def test_whole_examples_where_a_microbatch_divides():
    """Else tokens are split. Rows that only make shards of a sequence equal are left out."""
    program, bucket = program_of("video", WHOLE)
    whole = program.sharding_of(bucket)
    tokens = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS)
    assert whole.activation(tokens, (8, 16, 4)).spec == P(("data", "fsdp", "seq"), None, "tensor")
    # Heads stay split over `tensor`, and a batch of 4, or microbatches of it, do not divide over 8 devices.
    mixed = program_of("video", MESHES["fsdp-seq-tensor"])[0]
    assert mixed.sharding_of(bucket).activation(tokens, (8, 16, 4)).spec == P(("data", "fsdp", "seq"), None, "tensor")
    assert program.sharding_of(bucket.replace(batch_size=4)) is program.sharding
    halves = dataclasses.replace(
        program, experiment=program.experiment.replace(training=TrainingConfig(steps=1, accumulation=2))
    )
    assert halves.sharding_of(bucket) is program.sharding
    # So does an evaluation, by the number of examples that it gets.
    for examples, parts in ((8, 2), (4, 1), (None, 1)):
        with program.tracing(examples):
            assert axes.spread_parts() == parts
    denoiser = program.task.networks["denoiser"].bind(program.abstract.parameters["denoiser"])
    paddings = []
    for sharding in (program.sharding, whole):
        with axes.partitioned(sharding):
            paddings.append(denoiser.layout((2, 2, 2), 7).padding)
    # 7 rows of text and 2 x 1 x 1 of video in patches of 2 x 2, to a multiple of 8, and of 4.
    assert paddings == [7, 3]

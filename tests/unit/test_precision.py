"""Precision of products: float32 operands are multiplied in float32, bfloat16 ones in one pass, in every program."""

import ast
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jvgen import config, saved_config
from jvgen.config import ConfigError
from jvgen.kernels.attention import reference
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.nn.attention import attention
from jvgen.nn.conv import convolve
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network
from jvgen.parallel import axes
from jvgen.parallel.axes import EMBED, MLP
from jvgen.parallel.mesh import MeshConfig, make_mesh, single_device_mesh
from jvgen.parallel.rules import Sharding
from jvgen.precision import float32_products, in_full_precision, product_precision
from jvgen.preflight import ahead_of_time, topology
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.network_dtypes import describe_precision
from jvgen.training.program import Program

sys.path.insert(0, str(Path(__file__).parents[1]))
import products  # noqa: E402

JVGEN = Path(__file__).parents[2] / "jvgen"
CONFIGS = JVGEN.parent / "configs"
HIGHEST, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT

needs_compiler = pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")


def demo(name: str, *assignments: str) -> Experiment:
    """A demo's experiment without Muon, whose products are Optax's."""
    overrides = ("optimizer.kind=adamw", "optimizer.muon_exclude=", *assignments)
    return config.override(config.load(CONFIGS / f"{name}.py"), overrides)


def traced(program: Program, what: str) -> list[products.Product]:
    """The products of the training step, or of an evaluation program."""
    bucket, state = program.experiment.data.buckets[0], program.abstract_state()
    batch = program.abstract_batch(bucket)
    if what == "step":
        return products.traced(program.step(bucket), state, batch)
    return products.traced(program.evaluation(what), state.parameters, state.frozen, batch, state.key)


# Every way to write a product in JAX that takes a precision.
CALLS = {
    "einsum",
    "matmul",
    "dot",
    "tensordot",
    "vdot",
    "inner",
    "dot_general",
    "conv_general_dilated",
    "conv",
    "convolve",
}
# Where `a @ b` multiplies numpy arrays or torch tensors.
NUMPY = {
    "data", "evaluation", "interop", "control/scene_environment.py", "geometry/homography.py", "geometry/rotations.py",
    "models/cv_vae/inflate.py",
}  # fmt: skip


def test_every_product_says_its_precision():
    """A product without it is float32 on CPUs alone. `a @ b` on JAX arrays is for functions `in_full_precision`."""
    problems = []
    for file in sorted(JVGEN.rglob("*.py")):
        name = file.relative_to(JVGEN).as_posix()
        tree = ast.parse(file.read_text())
        exact = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and any(getattr(decorator, "id", "") == in_full_precision.__name__ for decorator in function.decorator_list)
            for node in ast.walk(function)
        }
        numpy = name in NUMPY or name.split("/")[0] in NUMPY
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and id(node) not in exact and not numpy:
                problems.append(f"{name}:{node.lineno}: @")
            if not isinstance(node, ast.Call):
                continue
            # `functools.partial(jnp.einsum, precision=...)` is a call with the function as its argument.
            functions = [node.func, *node.args[:1]] if ast.unparse(node.func).endswith("partial") else [node.func]
            words = [ast.unparse(function) for function in functions]
            if any(w.startswith(("jnp.", "jax.", "lax.")) and w.split(".")[-1] in CALLS for w in words) and not any(
                keyword.arg == "precision" for keyword in node.keywords
            ):
                problems.append(f"{name}:{node.lineno}: {words[-1]}")
    assert not problems, "products without precision=product_precision(...): " + ", ".join(problems)


def test_the_rule():
    assert product_precision(jnp.float32) == product_precision(jnp.float64, jnp.float32) == HIGHEST
    assert product_precision(jnp.bfloat16) == product_precision(jnp.float32, jnp.bfloat16) == DEFAULT
    with float32_products("high"):
        assert product_precision(jnp.float32) == jax.lax.Precision.HIGH
        assert product_precision(jnp.float16) == DEFAULT
    assert product_precision(jnp.float32) == HIGHEST
    # JAX's process-wide default changes nothing: the kernels of TPUs refuse "highest" for bfloat16.
    with jax.default_matmul_precision("highest"):
        assert product_precision(jnp.bfloat16) == DEFAULT


def test_a_jitted_function_is_traced_once_per_level():
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=product_precision(x.dtype)))
    x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    found = []
    for level in ("highest", "default", "highest"):
        with float32_products(level):
            found += [product.precision for product in products.traced(multiply, x)]
    assert found == ["HIGHEST", "DEFAULT", "HIGHEST"]


SLOW = pytest.mark.slow
PROGRAMS = [
    ("demo_text_to_video", "step"),
    ("demo_text_to_video", "visualize"),
    ("demo_ivideogpt_transformer", "visualize"),
    ("demo_image_vae", "evaluate"),
    *(
        pytest.param(name, what, marks=SLOW)
        for name, what in [
            ("demo_ivideogpt_transformer", "step"), ("demo_ivideogpt_transformer", "evaluate"),
            ("demo_image_vae", "step"), ("demo_multiview", "step"), ("demo_multiview", "visualize"),
            ("demo_cv_vae", "step"), ("demo_cv_vae", "evaluate"), ("demo_ivideogpt_tokenizer", "step"),
            ("demo_ivideogpt_tokenizer", "evaluate"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what"), PROGRAMS)
def test_a_float32_run_multiplies_float32(name, what):
    """Sampling, rollouts, autoencoders and training, with the gradients' loops and custom backward passes."""
    program = Program.build(demo(name, "training.precision.compute_dtype=float32"), single_device_mesh())
    found = traced(program, what)
    assert found and {(product.dtypes, product.precision) for product in found} == {(("float32", "float32"), "HIGHEST")}


def test_the_level_reaches_the_backward_pass():
    experiment = demo(
        "demo_text_to_video", "training.compute_dtype=float32", "training.precision.matmul_precision=high"
    )
    found = traced(Program.build(experiment, single_device_mesh()), "step")
    assert found and {product.precision for product in found} == {"HIGH"}


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "None")])
def test_muon(dtype, precision):
    """Its authors compute it in bfloat16: only a float32 run pays for float32 passes."""
    experiment = config.load(CONFIGS / "demo_text_to_video.py")
    experiment = config.override(experiment, [f"training.precision.compute_dtype={dtype}"])
    with jax.default_matmul_precision(None):
        found = traced(Program.build(experiment, single_device_mesh()), "step")
    width = experiment.task.denoiser.heads * experiment.task.denoiser.head_width
    square = ((experiment.task.denoiser.layers, width, width),) * 2
    assert {product.precision for product in found if product.shapes == square} == {precision}


def described_mesh():
    return make_mesh(MeshConfig(fsdp=4), topology.describe("v5e:2x2").devices)


@needs_compiler
def test_a_bfloat16_step_has_no_float32_passes_but_for_timesteps():
    """As traced for TPUs: kernels of CPUs compute in float32."""
    experiment = demo("demo_text_to_video", "training.precision.compute_dtype=bfloat16")
    batch = experiment.data.buckets[0].batch_size
    found = traced(Program.build(experiment, described_mesh()), "step")
    passes = [product for product in found if product.precision != "DEFAULT"]
    # The embedding of a timestep has one row per example; its gradients are float32 as well.
    assert passes and all(product.is_float32 and batch in product.shapes[0] for product in passes), passes
    assert all(len(product.shapes[0]) == 2 for product in passes) and len(passes) < len(found) / 5
    # In one pass all the same: the weighted sum of attention over few keys, whose values were bfloat16.
    assert all(len(p.shapes[0]) == 4 for p in found if p.is_float32 and p.precision == "DEFAULT")


@needs_compiler
def test_float32_networks_compute_in_float32_beside_bfloat16_ones():
    """The tokenizer by the world model's own choice, the denoiser and the autoencoder by the user's."""
    assignments = ("training.compute_dtype=bfloat16", "training.precision.float32_networks=vae,denoiser")
    program = Program.build(demo("demo_text_to_video", *assignments), described_mesh())
    found = traced(program, "visualize")
    convolutions = {(p.dtypes[0], p.precision) for p in found if p.kind == "conv_general_dilated"}
    assert convolutions == {("float32", "HIGHEST")}
    assert {(p.dtypes[0], p.precision) for p in found if p.dtypes[0] == "bfloat16"} == {("bfloat16", "DEFAULT")}
    # What is left in bfloat16 is the text encoder: every product has its tokens.
    length = program.experiment.task.text.length
    assert all(length in p.shapes[0] for p in found if p.dtypes[0] == "bfloat16")

    program = Program.build(demo("demo_ivideogpt_transformer", "training.compute_dtype=bfloat16"), described_mesh())
    found = traced(program, "step")
    convolutions = {(p.dtypes, p.precision) for p in found if p.kind == "conv_general_dilated"}
    assert convolutions == {(("float32", "float32"), "HIGHEST")}
    assert any(p.dtypes == ("bfloat16", "bfloat16") for p in found)


@SLOW
@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("demo_text_to_video", "text_encoder"),
        ("demo_multiview", "denoiser"),
        ("demo_multiview", "text_encoder"),
        ("demo_cv_vae", "vae"),
        ("demo_cv_vae", "image_vae"),
        ("demo_image_vae", "vae"),
        ("demo_ivideogpt_tokenizer", "tokenizer"),
        ("demo_ivideogpt_transformer", "transformer"),
    ],
)
def test_each_network_can_be_float32(name, networks):
    """Promotion is strict in here: a network that met the other dtype would fail."""
    changes = ("training.compute_dtype=bfloat16", f"training.precision.float32_networks={networks}")
    program = Program.build(demo(name, *changes), single_device_mesh())
    assert traced(program, "step") and traced(program, "evaluate")


def test_unknown_networks_are_named():
    experiment = demo("demo_text_to_video", "training.precision.float32_networks=vea")
    with pytest.raises(ConfigError, match="float32_networks: 'vea' is no network of this task; it has denoiser, text_"):
        Program.build(experiment, single_device_mesh())


def test_the_policy_in_one_line():
    task = config.load(CONFIGS / "demo_ivideogpt_transformer.py").task.build()
    line = describe_precision(task, PrecisionConfig())
    assert line == ("precision: bfloat16 compute; products of float32 operands at highest; float32 networks: tokenizer")
    assert "networks" not in describe_precision(task, PrecisionConfig(compute_dtype="float32"))


def test_the_dtype_has_its_old_name_too():
    """On the command line, and in saved configs, which had no policy."""
    experiment = config.override(config.load(CONFIGS / "demo_image_vae.py"), ["training.compute_dtype=bfloat16"])
    assert experiment.training.precision == PrecisionConfig(compute_dtype="bfloat16")
    saved = '{"class": "TrainingConfig", "steps": 3, "compute_dtype": "float32"}'
    assert saved_config.from_json(saved) == TrainingConfig(steps=3, precision=PrecisionConfig(compute_dtype="float32"))
    with pytest.raises(ConfigError, match="training.compute_dtype = 'float8'"):
        config.override(experiment, ["training.compute_dtype=float8"])


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    network = Network.of(lambda rngs: Linear(*kernel.shape, axes=(EMBED, MLP), bias=False, rngs=rngs))
    return network.apply({"kernel": kernel}, x)


def convolution(axes_count: int):
    return functools.partial(convolve, strides=(1,) * axes_count, padding=((1, 1),) * axes_count)


LAYERS = {
    "linear": (linear, (256, 128), (128, 256)),
    "convolution of images": (convolution(2), (2, 16, 16, 8), (3, 3, 8, 8)),
    "convolution of clips": (convolution(3), (1, 2, 8, 8, 8), (2, 3, 3, 8, 8)),
    "attention, all scores": (lambda q, k: reference.attention(q, k, k, scale=0.1), (1, 256, 2, 64), (1, 256, 2, 64)),
    "attention as chosen": (lambda q, k: attention(q, k, k), (1, 512, 2, 64), (1, 512, 2, 64)),
}


def compiled_text(lowered: jax.stages.Lowered) -> str:
    with ahead_of_time.without_cache():
        return lowered.compile().as_text()


def compiled_for_tpu(function, *arguments, dtype=jnp.float32) -> list[products.Product]:
    """The products in the program that libtpu makes of a function; arguments are shapes, or trees of them."""
    sharding = Sharding(make_mesh(MeshConfig(fsdp=1), topology.describe("v5e:2x2").devices[:1]))

    def placed(leaf):
        return jax.ShapeDtypeStruct(getattr(leaf, "shape", leaf), dtype, sharding=sharding.replicated)

    def program(*arrays):
        with axes.partitioned(sharding):
            return function(*arrays)

    specs = jax.tree.map(placed, arguments, is_leaf=lambda node: isinstance(node, tuple) and isinstance(node[0], int))
    found = products.compiled(compiled_text(jax.jit(program).lower(*specs)))
    assert found
    return found


@needs_compiler
@pytest.mark.parametrize("name", LAYERS)
def test_layers_as_compiled_for_tpus(name):
    """Forward and backward; where precision is not set, the same programs say DEFAULT, which is bfloat16 there."""
    function, *shapes = LAYERS[name]

    def loss(*arrays):
        return jnp.sum(jnp.square(function(*arrays).astype(jnp.float32)))

    found = compiled_for_tpu(jax.grad(loss, argnums=(0, 1)), *shapes)
    assert {(product.dtypes, product.precision) for product in found} == {(("float32", "float32"), "HIGHEST")}
    if name == "linear":
        found = compiled_for_tpu(jax.grad(loss, argnums=(0, 1)), *shapes, dtype=jnp.bfloat16)
        assert {(product.dtypes, product.precision) for product in found} == {(("bfloat16", "bfloat16"), "DEFAULT")}


@pytest.mark.slow
@needs_compiler
def test_encoders_as_compiled_for_tpus():
    vae = ImageVAEConfig.tiny()
    network = Network.of(lambda rngs: ImageVAE(vae, rngs=rngs))
    encode = functools.partial(network.apply, method="encode")
    assert {p.precision for p in compiled_for_tpu(encode, network.shapes, (1, 16, 16, 3))} == {"HIGHEST"}
    tokenizer = config.load(CONFIGS / "demo_ivideogpt_tokenizer.py").task.network.replace(block_channels=(8, 8))
    network = Network.of(lambda rngs: CompressiveTokenizer(tokenizer, rngs=rngs))
    tokenize = functools.partial(network.apply, method="tokenize")
    size = tokenizer.resolution
    assert {p.precision for p in compiled_for_tpu(tokenize, network.shapes, (1, 3, size, size, 3))} == {"HIGHEST"}


@SLOW
@needs_compiler
def test_steps_as_compiled_for_tpus():
    """A float32 tokenizer beside a bfloat16 transformer, and a bfloat16 denoiser."""
    experiment = demo("demo_ivideogpt_transformer", "training.compute_dtype=bfloat16", "task.transformer.layers=1")
    program = Program.build(experiment, described_mesh())
    found = products.compiled(compiled_text(program.lower(experiment.data.buckets[0])))
    kinds = {(product.dtypes, product.precision) for product in found}
    assert (("float32", "float32"), "HIGHEST") in kinds and (("bfloat16", "bfloat16"), "DEFAULT") in kinds

    experiment = demo("demo_text_to_video", "training.compute_dtype=bfloat16", "task.denoiser.layers=1")
    program = Program.build(experiment, described_mesh())
    found = products.compiled(compiled_text(program.lower(experiment.data.buckets[0])))
    passes = [product for product in found if product.precision != "DEFAULT"]
    assert len(passes) < len(found) / 4, found

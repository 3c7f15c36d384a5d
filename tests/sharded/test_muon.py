"""Muon on eight CPU devices: equal to one device, and no device gets a whole stack of matrices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import nested
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.preflight import collectives
from jvgen.training.optimization.optimizer import OptimizerConfig, make_optimizer

# One stack of two blocks, one that its devices do not divide, and single matrices, split by the longer or shorter side.
SHAPES = {
    "modulation/kernel": (4, 16, 64), "query/kernel": (6, 32, 48), "text/kernel": (48, 16), "out/kernel": (32, 8),
    "out/bias": (8,),
}  # fmt: skip
AXES = {
    "modulation/kernel": (axes.LAYERS, axes.CONDITION, axes.EMBED),
    "query/kernel": (axes.LAYERS, axes.EMBED, axes.HEADS),
    "text/kernel": (None, axes.EMBED),
    "out/kernel": (axes.EMBED, None),
    "out/bias": (None,),
}


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["fsdp", "mixed"])
def test_matrices_are_orthogonalized_where_they_are_owned(mesh):
    sharding = Sharding(make_mesh(mesh), ShardingConfig(replicate_below=0))
    made = make_optimizer(
        OptimizerConfig(kind="muon", muon_blocks={"modulation": 2}, weight_decay=0.0), nested.unflatten(AXES), 10
    )
    rng = np.random.default_rng(0)
    kernels, gradients = (
        nested.unflatten({path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()})
        for _ in range(2)
    )

    def step(partitioner):
        def update(gradients, state, kernels):
            with axes.partitioned(partitioner):
                return made.update(gradients, state, kernels, jnp.float32(0.1))

        return update

    expected, _ = jax.jit(step(None))(gradients, made.init(kernels), kernels)
    stored = sharding.storage(nested.unflatten(AXES), kernels)
    placed = [jax.device_put(tree, stored) for tree in (gradients, kernels)]
    state = jax.eval_shape(made.init, kernels)
    moments = {"adam": {"out": stored["out"]}, "muon": {name: stored[name] for name in ("modulation", "query")}}

    def place(path, leaf):
        names = [str(key.key) for key in path if hasattr(key, "key")]
        return nested.flatten(moments | stored).get("/".join(names[1:]), sharding.replicated)

    places = jax.tree_util.tree_map_with_path(place, state)
    compiled = (
        jax.jit(step(sharding), out_shardings=(stored, places))
        .lower(placed[0], jax.device_put(made.init(kernels), places), placed[1])
        .compile()
    )
    found, _ = compiled(placed[0], jax.device_put(made.init(kernels), places), placed[1])
    for path, value in nested.flatten(expected).items():
        np.testing.assert_allclose(nested.flatten(found)[path], value, atol=2e-6, err_msg=path)
    exchanged = [one for one in collectives.read(compiled.as_text()) if one.kind in ("all-gather", "all-reduce")]
    sizes = {one.shape: [int(n) for n in re.findall(r"\d+", one.shape.partition("[")[2])] for one in exchanged}
    stacks = {math.prod(SHAPES[path]) for path in ("modulation/kernel", "query/kernel")}
    gathered = [one.shape for one in exchanged if one.kind == "all-gather"]
    assert not [shape for shape in gathered if math.prod(sizes[shape]) >= min(stacks)], sizes
    # A single matrix is whole nowhere; the squares of its shorter side are.
    assert not [shape for shape, size in sizes.items() if sorted(size[-2:]) == sorted(SHAPES["text/kernel"])], sizes
    assert [16, 16] in [size[-2:] for size in sizes.values()], sizes

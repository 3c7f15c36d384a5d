"""Convolutions: against a sum written out by hand, one to three axes, strides and one-sided padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.nn.conv import Conv2d, convolution_flops, convolve, output_size, upsample_nearest
from jvgen.nn.network import Network
from jvgen.parallel.axes import CONV_IN, CONV_OUT


def by_hand(inputs, kernel, strides, padding):
    padded = np.pad(inputs, ((0, 0), *padding, (0, 0)))
    window = kernel.shape[:-2]
    sizes = [
        output_size(size, window=w, stride=s, padding=p)
        for size, w, s, p in zip(inputs.shape[1:-1], window, strides, padding, strict=True)
    ]
    output = np.zeros((len(inputs), *sizes, kernel.shape[-1]))
    for place in itertools.product(*(range(size) for size in sizes)):
        area = tuple(slice(i * s, i * s + w) for i, s, w in zip(place, strides, window, strict=True))
        output[(slice(None), *place)] = np.tensordot(padded[(slice(None), *area)], kernel, kernel.ndim - 1)
    return output


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding"),
    [
        ((7,), (3,), (1,), ((1, 1),)),
        ((6, 7), (3, 3), (2, 2), ((0, 1), (0, 1))),
        ((5, 4), (2, 3), (1, 1), ((1, 0), (1, 1))),
        ((4, 3, 5), (3, 2, 3), (1, 1, 2), ((2, 0), (0, 1), (1, 1))),
        ((5, 4), (3, 2), (1, 1), ((0, 0), (0, 0))),
        ((5, 4, 6), (3, 3, 2), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    ],
)
def test_convolution_equals_its_definition(size, window, strides, padding):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, *size, 3)).astype(np.float32)
    kernel = rng.standard_normal((*window, 3, 4)).astype(np.float32)
    output = convolve(jnp.asarray(inputs), jnp.asarray(kernel), strides=strides, padding=padding)
    np.testing.assert_allclose(output, by_hand(inputs, kernel, strides, padding), atol=2e-5)


@pytest.mark.parametrize(
    ("batch", "channels", "strides", "padding"),
    [
        (2, 8, (2, 1), ((0, 1), (1, 1))),
        (16, 8, (2, 1), ((0, 1), (1, 1))),
        (24, 9, (2, 1), ((0, 1), (1, 1))),
        (16, 3, (2, 1), ((0, 1), (1, 1))),
        (16, 8, (1, 1), ((0, 0), (0, 0))),
    ],
)
def test_gradients_are_those_of_the_plain_convolution(key, batch, channels, strides, padding):
    inputs = jax.random.normal(key, (batch, 5, 4, 3))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (3, 3, 3, channels))
    geometry = {"strides": strides, "padding": padding}

    def ours(inputs, kernel):
        return convolve(inputs, kernel, **geometry)

    def plain(inputs, kernel):
        return jax.lax.conv_general_dilated(
            inputs, kernel, geometry["strides"], geometry["padding"], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def penalty(convolution, inputs, kernel):
        # A gradient of a gradient, as discriminators are regularized.
        of_inputs = jax.grad(lambda x: jnp.sum(jnp.square(convolution(x, kernel))))(inputs)
        return jnp.sum(jnp.sin(of_inputs))

    for function in (lambda f, x, k: jnp.sum(jnp.sin(f(x, k))), penalty):
        found, expected = (
            jax.jit(jax.grad(lambda x, k, f=f, function=function: function(f, x, k), argnums=(0, 1)))(inputs, kernel)
            for f in (ours, plain)
        )
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5 * np.abs(right).max(), rtol=0)


def test_batches_are_split_on_cpus_only(key):
    def gradient(kernel, inputs):
        return jax.grad(lambda k: jnp.sum(convolve(inputs, k, strides=(1, 1), padding=((1, 1), (1, 1)))))(kernel)

    arrays = jnp.zeros((3, 3, 8, 8)), jnp.zeros((32, 8, 8, 8))
    traced = jax.jit(gradient).trace(*arrays)
    counts = {name: traced.lower(lowering_platforms=(name,)).as_text().count("convolution(") for name in ("cpu", "tpu")}
    assert counts["cpu"] == counts["tpu"] + 3


def test_layer_keeps_the_size_adds_its_bias_and_names_its_axes(key):
    network = Network.of(lambda rngs: Conv2d(3, 4, rngs=rngs))
    assert network.axes == {"kernel": (None, None, CONV_IN, CONV_OUT), "bias": (CONV_OUT,)}
    parameters = {"kernel": jax.random.normal(key, (3, 3, 3, 4)), "bias": jnp.arange(4.0)}
    images = jnp.ones((1, 5, 6, 3), jnp.bfloat16)
    output = network.apply(parameters, images)
    assert output.shape == (1, 5, 6, 4) and output.dtype == jnp.bfloat16
    without = network.apply({**parameters, "bias": jnp.zeros(4)}, images.astype(jnp.float32))
    np.testing.assert_allclose(
        network.apply(parameters, images.astype(jnp.float32)) - without,
        np.broadcast_to(np.arange(4.0), (1, 5, 6, 4)),
        atol=1e-5,
    )


def test_upsampling_repeats_pixels():
    images = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(upsample_nearest(images)[0, :, :, 0], np.kron([[0, 1], [2, 3]], np.ones((2, 2))))


def test_convolution_flops():
    assert convolution_flops((3, 3, 4, 5), (6, 7)) == 2 * 9 * 4 * 5 * 42

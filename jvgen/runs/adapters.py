"""Runs that train a LoRA: their adapters to files and from files, and their networks with them merged in."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jvgen.config import Config, ConfigError
from jvgen.interop.digest import CARD_FILE, content_digest
from jvgen.interop.from_torch import import_folder
from jvgen.interop.lora_file import Layout, LoraFile
from jvgen.interop.lora_folder import adapter_files, is_lora, read_adapters, write_adapters
from jvgen.interop.to_torch import check_target, complete_or_absent, export_network
from jvgen.nn import lora
from jvgen.nn.network import Parameters
from jvgen.parallel.mesh import host_device
from jvgen.storage import Path, absolute, size, write_text
from jvgen.tasks.task import Task, TaskConfig
from jvgen.training.checkpoint.initial import write_first_checkpoint
from jvgen.training.experiment import Experiment


def trains_lora(config: TaskConfig) -> bool:
    """Whether a run of the task trains a LoRA, and not the networks that it is beside."""
    return getattr(config, "lora", None) is not None


def export_lora(
    task: Task,
    parameters: Parameters,
    folder: Path,
    record: Mapping[str, Any],
    dtype: str,
    layout: Literal["folders", "sat"],
    overwrite: bool,
    card: str | None,
) -> Path:
    """Write the adapters of a run as a folder, with the networks that it trains besides.

    Arguments are those of `jvgen.runs.exporting.export`.

    Raises:
      ExportError, NotFinite: see `jvgen.interop.lora_file.write_lora`.
    """
    names: Layout | None = "sat" if layout == "sat" else None
    factors, config, bases = parameters[lora.TREE], task.config, task.base_networks
    check_target(folder, overwrite, sum(leaf.nbytes for leaf in jax.tree.leaves(factors)))
    about = {**record, **{f"{name}_weights": bases[name].weights for name in factors}}
    with complete_or_absent(folder, overwrite) as partial:
        configs = {name: bases[name].config for name in factors}
        for name, config_of_network in task.network_configs.items():
            export_network(config_of_network, parameters[name], partial / name, dtype=dtype)
        written = write_adapters(partial, configs, factors, config.lora.scale, layout=names, dtype=dtype)
        places = [file.relative_to(partial) for file in written]
        write_text(partial / "jvgen_run.json", json.dumps(about, indent=2) + "\n")
        if card:
            write_text(partial / CARD_FILE, card)
    for name, place in zip(factors, places, strict=True):
        print(f"{folder / place}: {size(folder / place) / 1e6:.1f} MB, the LoRA of {bases[name].weights}")
    return folder


def with_merged_lora(
    task: Task, parameters: Parameters, trained_with: str | None
) -> tuple[Task, dict[str, Config], Parameters]:
    """The task of a run that trained whole networks, their configurations, and their parameters: those of their files,
    with a LoRA merged into them where the run has one.

    Raises:
      ConfigError: files that are not those which the run was trained with.
    """
    if trained_with and task.frozen_digest() != trained_with:
        named = ", ".join(f"{name} from {base.weights!r}" for name, base in task.base_networks.items())
        raise ConfigError(
            f"one of the run's frozen networks ({named}, ...) is not that which it was trained with (another content "
            "hash): put the files back that its task names."
        )
    whole, adapted = task.config.without_lora().build(), parameters[lora.TREE]
    configs = dict(whole.network_configs)
    found = {name: parameters[name] for name in configs if name in parameters}
    for name, base in task.base_networks.items():
        if name in adapted or name in whole.networks:
            configs[name], tree = base.config, {name: import_folder(base.weights, base.config)[1], lora.TREE: adapted}
            with jax.default_device(host_device()):
                found[name] = lora.whole(name, jax.tree.map(jnp.asarray, tree), task.config.lora)
    return whole, configs, found


def import_lora(weights: Path, experiment: Experiment, workdir: Path) -> None:
    """A run at step 0 with the LoRA of a file, or of the files of a folder.

    Raises:
      ConfigError: a run that trains no LoRA, or another rank, scale, layers or blocks than those of the file.
      ValueError, UnreadableFile, WeightError: see `jvgen.interop.lora_file.read_lora`.
    """
    if not trains_lora(experiment.task):
        raise ConfigError(f"{weights} is a LoRA, and {experiment.name} trains none: set task.lora.")
    if weights.is_dir() and not is_lora(weights):
        raise ConfigError(
            f"{experiment.name} trains a LoRA alone, and {weights} holds none: name weights of the networks in the "
            "task's fields for them (task.denoiser_weights), and start with `jvgen train`."
        )
    experiment.task.check_weights()
    task = experiment.task.build()
    wanted = task.networks[lora.TREE].shapes
    configs = {name: base.config for name, base in task.base_networks.items()}
    found = read_adapters(weights, configs)
    for adapter in found.values():
        _check_scale(adapter, experiment.task.lora, weights)
    here, there = (
        {f"{name}/{path}" for name, factors in tree.items() for path in lora.pairs(factors)}
        for tree in (wanted, {name: adapter.factors for name, adapter in found.items()})
    )
    if here != there:
        lines = [f"  {path}: in the file, not in task.lora.targets" for path in sorted(there - here)]
        lines += [f"  {path}: in task.lora.targets, not in the file" for path in sorted(here - there)]
        raise ConfigError("\n".join([f"{weights} is a LoRA of other layers than the run's:", *lines]))
    files = adapter_files(weights, configs)
    records = [{"network": f"{lora.TREE} of {name}", "path": str(absolute(file)), "digest": content_digest(file)}
               for name, file in files.items()]  # fmt: skip
    lines = [f"  {name}/{path}: blocks {', '.join(map(str, blocks))}"
             for name, adapter in found.items() for path, blocks in adapter.absent.items()]  # fmt: skip
    if lines:
        head = f"{weights} is a LoRA of some blocks only, and a run trains that of all; the file lacks:"
        raise ConfigError(
            "\n".join([head, *lines])
            + "\nSample with it as it is (`jvgen sample --weights DIR --lora FILE`), or give a LoRA of all blocks."
        )
    factors = {lora.TREE: {name: found[name].factors for name in wanted}}
    write_first_checkpoint(experiment, workdir, factors, records)
    print(f"{workdir}: step 0 with the LoRA of {len(there)} layers from {weights}; train with `jvgen train`")


def _check_scale(found: LoraFile, config: lora.LoraConfig, weights: Path) -> None:
    if found.rank != config.rank:
        raise ConfigError(f"task.lora.rank = {config.rank}, but {weights} has rank {found.rank}: make them equal.")
    if not math.isclose(found.scale, config.scale, rel_tol=1e-6):
        raise ConfigError(
            f"task.lora.alpha / task.lora.rank = {config.scale:g}, but {weights} was trained with "
            f"{found.alpha:g} / {found.rank} = {found.scale:g}: set task.lora.alpha={found.alpha:g}."
        )

"""Between runs and PyTorch folders: export a run, start one from published weights, describe a folder."""

import json
from collections.abc import Mapping
from typing import Any, Literal

import jax

from jvgen import __version__, saved_config
from jvgen.config import Config, ConfigError, dump
from jvgen.data.stream.config import DataConfig
from jvgen.data.stream.source_checks import check_reachable_encoders
from jvgen.interop.architecture import differences
from jvgen.interop.digest import CARD_FILE, content_digest
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder, read_config, with_variant
from jvgen.interop.inflate import inflate_folder
from jvgen.interop.lora_folder import is_lora
from jvgen.interop.sat_file import export_sat
from jvgen.interop.to_torch import Weights, export_networks
from jvgen.models.video_dit import conditioned_start
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.network import Parameters
from jvgen.parallel.mesh import host_device, single_device_mesh
from jvgen.parallel.rules import Sharding
from jvgen.runs import pipeline_export
from jvgen.runs.adapters import export_lora, import_lora, trains_lora, with_merged_lora
from jvgen.runs.model_card import model_card
from jvgen.storage import Path, absolute, as_path, resolved, size
from jvgen.tasks.given_frames import check_condition
from jvgen.tasks.pipeline_folder import DENOISER, adopt_pipeline, is_pipeline, pipeline_weights, read_pipeline
from jvgen.tasks.task import Task, TaskConfig
from jvgen.tasks.text_to_video_config import TextToVideoFields
from jvgen.tasks.world_model import TRAINED_WITH, WorldModelTask
from jvgen.training.checkpoint.initial import check_new_run, imported_weights, to_host, write_first_checkpoint
from jvgen.training.checkpoint.reader import CheckpointReader
from jvgen.training.checkpoint.restore import load_for_inference
from jvgen.training.experiment import Experiment


def export_run(
    run: Path,
    folder: Path,
    *,
    ema: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    layout: Literal["folders", "sat"] = "folders",
    network: str | None = None,
    merge_lora: bool = False,
    vae: Path | None = None,
) -> Path:
    """Export the run in a folder, see `export`.

    Args:
      run: run directory, or one checkpoint of it.
      ema, step: which weights, see `jvgen.training.checkpoint.restore.load_for_inference`.

    Raises:
      CheckpointError: no such run, or no valid checkpoint.
    """
    # In host memory: no accelerator is needed, and none has to hold the whole network.
    host = Sharding(single_device_mesh(host_device()))
    experiment, task, parameters, trained = load_for_inference(run, ema, step=step, sharding=host)
    about = {
        "experiment": experiment.name, "config_digest": saved_config.digest(experiment), "step": trained,
        "ema": str(ema or "best"),
    }  # fmt: skip
    document, data = _documents(run, trained)
    card = model_card(
        experiment, step=trained, ema=about["ema"], licenses=data.get("licenses"), commit=document.get("git") or "",
        imported=imported_weights(run), vae=vae,
    )  # fmt: skip
    return export(
        task, parameters, folder, about, dtype=dtype, overwrite=overwrite, layout=layout, network=network,
        trained_with=document.get("frozen") or "", merge_lora=merge_lora, card=card, vae=vae,
        data=experiment.data,
    )  # fmt: skip


def export(
    task: Task,
    parameters: Parameters,
    folder: Path,
    about: Mapping[str, Any],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    layout: Literal["folders", "sat"] = "folders",
    network: str | None = None,
    trained_with: str | None = None,
    merge_lora: bool = False,
    card: str | None = None,
    vae: Path | None = None,
    data: DataConfig | None = None,
) -> Path:
    """Write a text-to-video run as a pipeline that diffusers and `jvgen sample --weights` load, with the run's frozen
    VAE, text encoder and tokenizer; of other runs every trained network as a subfolder of its own, of a world model
    with its tokenizer. Of a run that trains a LoRA, write the LoRA alone, as diffusers and peft load it.

    Where diffusers has no pipeline for a text-to-video run (see `jvgen.runs.pipeline_export.obstacles`), its trained
    networks are written, and the reasons printed.

    Args:
      task: names the networks.
      parameters: `{network: ...}`.
      folder: to write; it appears complete or not at all.
      about: written to `jvgen_run.json`: experiment, digest of its config, step, which weights.
      dtype: dtype of the exported tensors: float32, bfloat16 or float16.
      overwrite: replace an existing folder.
      layout: "sat" writes the denoiser alone, as one file with the parameter names of the code that CogVideoX and
        RepVideo were trained with (`jvgen.interop.sat_file`).
      network: write this trained network alone.
      trained_with: content hash of the frozen weights that the run was trained with, to be compared; None for any.
      merge_lora: write networks with their LoRA merged into them, as those of a run without one.
      card: text of README.md, see `jvgen.runs.model_card`; none without.
      vae: folder of the VAE that made the latents of a run that names none, to be written into the pipeline.
      data: of the run: the VAE is compared with that which made its latents, where they are still there.

    Raises:
      ConfigError: no such network, or frozen weights that are not those which a LoRA or a world model was trained with.
      ExportError, NotFinite: see `jvgen.interop.to_torch.export_networks`.
      ValueError: a VAE that does not fit the run's latents, or that nothing is written with.
    """
    if vae is not None and (network is not None or layout == "sat" or (task.base_networks and not merge_lora)):
        raise ValueError(
            f"--vae {vae}: it is part of a whole pipeline; leave it out, or --network and --layout sat; and "
            "merge a LoRA (--merge-lora)."
        )
    record = {"jvgen": __version__, **about, "dtype": dtype}
    network_configs = task.network_configs
    if task.base_networks:
        if not merge_lora:
            if network is not None:
                raise ConfigError(
                    f"--network {network}: the run trains a LoRA alone, and no network; leave the flag out, or add "
                    "--merge-lora."
                )
            return export_lora(task, parameters, as_path(folder), record, dtype, layout, overwrite, card)
        task, network_configs, parameters = with_merged_lora(task, parameters, trained_with)
        # Compared there: the merged task does not have all of the frozen networks.
        trained_with = None
    elif merge_lora:
        raise ConfigError("--merge-lora: the run trains no LoRA; leave it out.")
    if network is not None and network not in network_configs:
        raise ConfigError(f"--network {network}: the run trains {', '.join(sorted(network_configs))}.")
    if layout == "sat":
        if network not in (None, "denoiser"):
            raise ConfigError(f"--network {network} --layout sat: this layout is of the denoiser alone; leave one out.")
        return _export_sat(task, parameters, as_path(folder), dtype)
    configs = {name: config for name, config in network_configs.items() if network in (None, name)}
    weights: Mapping[str, Weights] = {name: parameters[name] for name in configs}
    files: Mapping[str, str | Path] = task.exported_files()
    if network is not None:
        # No network beside it.
        files = {name: text for name, text in files.items() if isinstance(text, str)}
    reasons, notes = [], []
    if isinstance(task, WorldModelTask):
        notes = _check_tokenizer(task, files, trained_with)
    if network is None and pipeline_export.is_text_to_video(task):
        config = task.config if vae is None else task.config.with_vae(str(vae))
        reasons = pipeline_export.obstacles(config, trained_with, vae_was_given=vae is not None)
        if not reasons:
            configs, weights, files = pipeline_export.parts(config, parameters)
            notes = [*_check_vae(config, data, trained_with, vae), *pipeline_export.notes(config, dtype)]
    elif vae is not None:
        raise ValueError(f"--vae {vae}: {type(task).__name__} is exported without one; leave it out.")
    files = {"jvgen_run.json": json.dumps(record, indent=2) + "\n", **({CARD_FILE: card} if card else {}), **files}
    written = as_path(export_networks(configs, weights, folder, files=files, dtype=dtype, overwrite=overwrite))
    for name in sorted(configs):
        nbytes = sum(size(path) for path in (written / name).iterdir())
        print(f"{written / name}: {nbytes / 1e6:.1f} MB")
    for note in notes:
        print(f"note: {note}.")
    if reasons:
        print("no whole pipeline was written, only the trained networks:\n" + "\n".join(f"  {r}" for r in reasons))
    return written


def _check_vae(
    config: TextToVideoFields, data: DataConfig | None, trained_with: str | None, vae: Path | None
) -> list[str]:
    """Notes on the VAE of a run on cached latents; raises `ValueError` for another one than that which made these."""
    # One that the run names is compared by `trained_with`, if that is given.
    if data is None or config.latents != "data" or (vae is None and trained_with is not None):
        return []
    unread = check_reachable_encoders(data, content_digest(config.vae_weights))
    if not unread:
        return []
    return [
        f"{config.vae_weights} could not be compared with the VAE that made the run's latents: "
        f"{', '.join(unread)} cannot be read here"
    ]


def _check_tokenizer(task: WorldModelTask, files: Mapping[str, str | Path], trained_with: str | None) -> list[str]:
    """Notes on the tokenizer of an export; raises `ConfigError` for one that the run was not trained with."""
    given = task.config.tokenizer_weights
    digest = json.loads(str(files.get(TRAINED_WITH, "{}"))).get("tokenizer")
    if digest is None:
        return [f"task.tokenizer_weights = {given!r} is not there: no tokenizer was written beside the transformer"]
    if trained_with and digest not in trained_with.split("+"):
        raise ConfigError(
            f"task.tokenizer_weights = {given!r}: is not the tokenizer that the run was trained with (another content "
            "hash); put that one back, or move this one away to export the transformer alone."
        )
    return []


def _documents(run: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run document of a checkpoint, and the state of its loader."""
    checkpoints = CheckpointReader(run)
    try:
        return checkpoints.contents(step)[2], checkpoints.loader_state(step)
    finally:
        checkpoints.close()


def _export_sat(task: Task, parameters: Parameters, folder: Path, dtype: str) -> Path:
    if "denoiser" not in task.network_configs:
        raise ConfigError(f"--layout sat: the run trains {', '.join(sorted(task.network_configs))}, and no denoiser.")
    written = export_sat(
        task.network_configs["denoiser"], parameters["denoiser"], folder / "denoiser.safetensors", dtype=dtype
    )
    print(f"{written}: {size(written) / 1e6:.1f} MB")
    return folder


def import_run(
    weights: Path,
    experiment: Experiment,
    workdir: Path,
    *,
    network: str | None = None,
    inflate: bool = False,
    init_gates: bool = False,
    init_condition: bool = False,
    allow_partial: bool = False,
    variant: str | None = None,
) -> None:
    """Make a run directory whose training starts at step 0 with the weights of a PyTorch folder.

    Args:
      weights: diffusers or transformers folder, or one safetensors file. Of a whole CogVideoX pipeline the denoiser is
        imported; the run reads the frozen text encoder and autoencoder from that folder.
      experiment: its task has a network of the same architecture.
      workdir: to create; nothing of it is left if the import fails.
      network: which network takes the weights; the one with that kind of configuration unless given.
      inflate: the weights are of an image autoencoder, and initialize the task's video autoencoder.
      allow_partial: the weights may lack parameters of the network and hold others (iVideoGPT: context frames, heads).
      init_gates: the weights are CogVideoX's and the run is RepVideo's: its gates are initialized as configured.
      init_condition: the weights are of a text-to-video network and the run is of image to video: its additional
        channels, positions and offsets start without effect.
      variant: of the files in the folder, such as "fp16".

    Raises:
      ConfigError: no network of the task takes these weights, or several do.
      ValueError: weights of frozen networks that are missing or of other networks, as at the start of training.
      WeightError: the tensors do not fit; all are listed.
    """
    check_new_run(workdir)
    if trains_lora(experiment.task) or is_lora(weights):
        flags = {
            "--network": network, "--inflate": inflate, "--init-gates": init_gates, "--init-condition": init_condition,
            "--allow-partial": allow_partial, "--variant": variant,
        }  # fmt: skip
        if given := [flag for flag, value in flags.items() if value]:
            raise ConfigError(f"{', '.join(given)}: not valid with a LoRA, which is read from one file as it is.")
        import_lora(weights, experiment, workdir)
        return
    if is_pipeline(weights):
        experiment = experiment.replace(task=adopt_pipeline(experiment.task, resolved(weights), variant))
        weights = pipeline_weights(weights, variant)[DENOISER]
    else:
        weights = with_variant(weights, variant)
    experiment.task.check_weights()
    configs = dict(experiment.task.build().network_configs)
    if network is not None and network not in configs:
        raise ConfigError(f"--network {network}: the task trains {', '.join(sorted(configs))}.")
    if inflate:
        others = {"--init-gates": init_gates, "--init-condition": init_condition, "--allow-partial": allow_partial}
        if given := [flag for flag, value in others.items() if value]:
            raise ConfigError(f"{', '.join(given)}: not valid with --inflate, which is for autoencoders.")
        network = network or _only_video_autoencoder(configs)
        parameters = inflate_folder(weights, configs[network])
    else:
        if init_gates:
            if not any(_has_gates(config) for config in configs.values()):
                raise ConfigError(
                    "--init-gates: no network of the run has gates; set task.denoiser.aggregation, or leave it out."
                )
            configs = {name: _without_gates(config) for name, config in configs.items()}
        if init_condition:
            _check_begins_condition(experiment.task)
            configs = {name: _without_condition(config) for name, config in configs.items()}
        network, found = _identify(weights, configs, network)
        if isinstance(found, VideoDiTConfig) and not init_condition:
            _check_condition(found, experiment.task, str(weights))
        lines = differences(found, configs[network])
        if lines and not (allow_partial and _names_its_architecture(weights)):
            hint = "\nTo start a RepVideo run from CogVideoX's weights, pass --init-gates." * _lacks_gates(lines)
            raise ConfigError(
                f"{weights} is not the architecture of {network!r} in {experiment.name}:\n"
                + "\n".join(f"  {line}" for line in lines)
                + f"\nSet task fields of {network!r} to those of the weights, or import other weights."
                + hint
            )
        config = None if _names_its_architecture(weights) else found
        # Parameter by parameter, unless they are still to be adapted.
        _, parameters = import_folder(weights, config, place=None if lines else lambda path, array: to_host(array))
        if lines:
            parameters = format_of(found).adapt_parameters(parameters, found, configs[network])
        if init_condition:
            built = experiment.task.build()
            shapes = built.networks[network].shapes
            parameters = conditioned_start.begin(parameters, built.network_configs[network], shapes)
    record = {"network": network, "path": str(absolute(weights)), "digest": content_digest(weights)}
    write_first_checkpoint(experiment, workdir, {network: parameters}, [record])
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    print(f"{workdir}: step 0 with {count:,} parameters from {weights} as {network!r}; train with `jvgen train`")


def _identify(weights: Path, configs: Mapping[str, Config], network: str | None) -> tuple[str, Config]:
    """Which network the weights are for, and their architecture: that of a single file is what the experiment says."""
    if not _names_its_architecture(weights):
        if network is None and len(configs) != 1:
            raise ConfigError(
                f"{weights} has no config.json beside it: say which of {', '.join(sorted(configs))} with --network."
            )
        network = network or next(iter(configs))
        return network, configs[network]
    found = read_config(weights)
    if network is not None:
        return network, found
    matching = [name for name, config in sorted(configs.items()) if type(config) is type(found)]
    if len(matching) != 1:
        raise ConfigError(
            f"{weights} holds a {type(found).__name__}; networks of this kind in the task: "
            f"{', '.join(matching) or 'none'}. Choose another config, or name the network with --network."
        )
    return matching[0], found


def _names_its_architecture(weights: Path) -> bool:
    return not weights.is_file() or (weights.parent / "config.json").is_file()


def _check_condition(found: VideoDiTConfig, task: TaskConfig, weights: str) -> None:
    if not isinstance(task, TextToVideoFields):
        return
    try:
        check_condition(task.condition, found, weights)
    except ValueError as error:
        begins = task.condition != "none" and found == conditioned_start.without_condition(found)
        hint = " To start image to video from text-to-video weights, pass --init-condition." * begins
        raise ConfigError(f"{error}{hint}") from error


def _check_begins_condition(task: TaskConfig) -> None:
    if not isinstance(task, TextToVideoFields) or task.condition == "none":
        raise ConfigError(
            "--init-condition: the run's task has no condition; set task.condition = first_frame and "
            "task.denoiser.in_channels to twice its out_channels, or leave the flag out."
        )


def _without_condition(config: Config) -> Config:
    return conditioned_start.without_condition(config) if isinstance(config, VideoDiTConfig) else config


def _has_gates(config: Config) -> bool:
    return getattr(config, "aggregation", None) is not None


def _without_gates(config: Config) -> Config:
    return config.replace(aggregation=None) if _has_gates(config) else config


def _lacks_gates(lines: list[str]) -> bool:
    return any(line.startswith("aggregation: None in the weights") for line in lines)


def _only_video_autoencoder(configs: Mapping[str, Config]) -> str:
    """The network to initialize: the one whose config has a temporal compression."""
    names = [name for name, config in sorted(configs.items()) if hasattr(config, "temporal_downsampling")]
    if len(names) != 1:
        raise ConfigError(
            f"--inflate: the task has the video autoencoders {', '.join(names) or '(none)'}; expected exactly one. "
            "Choose the --config of a video VAE, or leave --inflate out."
        )
    return names[0]


def describe_weights(weights: Path, variant: str | None = None) -> str:
    """Describe a folder: its network (for a pipeline, each of them), configuration, number of parameters."""
    if is_pipeline(weights):
        read_pipeline(weights, variant)
        return "\n".join(describe_weights(path) for path in pipeline_weights(weights, variant).values())
    weights = with_variant(weights, variant)
    config, parameters = import_folder(weights)
    leaves = jax.tree.leaves(parameters)
    count = sum(leaf.size for leaf in leaves)
    return f"{weights}: {count:,} parameters in {len(leaves)} arrays\n{dump(config)}"

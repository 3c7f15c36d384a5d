"""Configs as JSON, with a stable name for every class: what a checkpoint keeps, readable by later versions.

A saved config names classes, not modules, so that moving a class never orphans a run. A field that the saved config
lacks takes its default; renamed fields and classes are listed where they were renamed.
"""

import dataclasses
import enum
import hashlib
import importlib
import json
import sys
from typing import Any

from jvgen.config import Config, ConfigError
from jvgen.field_types import field_hints, item_hint, options

# Stable name of each class -> the module that defines it now. Names never change; rows follow classes that move.
HOMES = {
    "AdversarialConfig": "jvgen.tasks.adversarial",
    "AggregationConfig": "jvgen.models.video_dit.config",
    "AlignmentConfig": "jvgen.tasks.alignment",
    "AugmentationConfig": "jvgen.data.stream.augment",
    "BucketConfig": "jvgen.data.stream.config",
    "ByteTextConfig": "jvgen.models.byte_text.config",
    "CVDCheckpointConfig": "jvgen.models.multiview.cvd_checkpoint",
    "CVVAEConfig": "jvgen.models.cv_vae.config",
    "CaptionConfig": "jvgen.data.stream.captions",
    "CheckpointConfig": "jvgen.training.config",
    "ClipDiscriminatorConfig": "jvgen.models.clip_discriminator.config",
    "ClipNormConfig": "jvgen.models.cv_vae.config",
    "ClipPaddingConfig": "jvgen.models.cv_vae.config",
    "CogVideoXVAEConfig": "jvgen.models.cogvideox_vae.config",
    "CompressiveTokenizerConfig": "jvgen.models.ivideogpt.config",
    "DataConfig": "jvgen.data.stream.config",
    "Dinov2Config": "jvgen.models.dinov2.config",
    "DrQV2Config": "jvgen.control.drq_v2",
    "EmaConfig": "jvgen.training.optimization.ema",
    "EnhanceConfig": "jvgen.models.video_dit.enhance",
    "Experiment": "jvgen.training.experiment",
    "FilterConfig": "jvgen.data.builders.jobs",
    "FrameTransformerConfig": "jvgen.models.ivideogpt.config",
    "GuidanceConfig": "jvgen.diffusion.guidance",
    "HomographyConfig": "jvgen.data.stream.pairs",
    "ImaginationConfig": "jvgen.reinforcement.config",
    "ImageVAEConfig": "jvgen.models.image_vae.config",
    "ImageVAETaskConfig": "jvgen.tasks.image_vae",
    "InitFromConfig": "jvgen.training.config",
    "LRStage": "jvgen.training.optimization.optimizer",
    "LoraConfig": "jvgen.nn.lora",
    "MeshConfig": "jvgen.parallel.mesh",
    "MultiViewConfig": "jvgen.tasks.multiview",
    "MultiViewDiTConfig": "jvgen.models.multiview.config",
    "ObjectiveConfig": "jvgen.diffusion.objective",
    "OptimizerConfig": "jvgen.training.optimization.optimizer",
    "PairingConfig": "jvgen.diffusion.collaborative",
    "PerceptualConfig": "jvgen.losses.perceptual",
    "PlannerConfig": "jvgen.control.planning",
    "PoseEncoderConfig": "jvgen.models.multiview.pose_encoder",
    "PrecisionConfig": "jvgen.training.config",
    "RecordingConfig": "jvgen.runs.recording",
    "ReinforcementConfig": "jvgen.reinforcement.config",
    "ReleasedFaults": "jvgen.reinforcement.config",
    "RestartConfig": "jvgen.tasks.video_tokenizer",
    "SamplerConfig": "jvgen.diffusion.sampler",
    "SamplingConfig": "jvgen.models.ivideogpt.sampling",
    "SceneConfig": "jvgen.data.scenes.scenes",
    "ScheduleConfig": "jvgen.diffusion.schedule",
    "SegmentConfig": "jvgen.data.stream.segments",
    "SharedLatentsConfig": "jvgen.tasks.video_vae",
    "ShardingConfig": "jvgen.parallel.rules",
    "SourceConfig": "jvgen.data.stream.config",
    "SyncConfig": "jvgen.models.multiview.config",
    "T5Config": "jvgen.models.t5.config",
    "TaskConfig": "jvgen.tasks.task",
    "TemporalAttentionConfig": "jvgen.models.cv_vae.config",
    "TextConfig": "jvgen.tasks.text",
    "TextToVideoFields": "jvgen.tasks.text_to_video_config",
    "TextToVideoConfig": "jvgen.tasks.text_to_video",
    "TimestepConfig": "jvgen.diffusion.objective",
    "TrainingConfig": "jvgen.training.config",
    "VideoDiTConfig": "jvgen.models.video_dit.config",
    "VideoTokenizerConfig": "jvgen.tasks.video_tokenizer",
    "VideoVAETaskConfig": "jvgen.tasks.video_vae",
    "WandbConfig": "jvgen.training.config",
    "WeightStage": "jvgen.data.stream.config",
    "WorldModelConfig": "jvgen.tasks.world_model",
}

# Names that earlier versions saved -> names now.
RENAMED_CLASSES: dict[str, str] = {
    "RateStage": "LRStage",
    "ReleasedModulesConfig": "CVDCheckpointConfig",
}


def to_json(config: Any) -> str:
    """The config as JSON text, with the stable name of every node's class, readable by `from_json`."""
    return json.dumps(_encode(config), indent=1)


def digest(config: Any) -> str:
    """A hash of a config: equal for equal configs of one version of jvgen, 16 hexadecimal digits."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def from_json(text: str) -> Any:
    """Rebuild a config written by `to_json` of this version or an earlier one.

    Only `Config` classes of jvgen, or of modules that the program has already imported, are built.

    Raises:
      ConfigError: a class or module that does not exist or may not be built, or a field that this version lacks.
    """
    return decode(json.loads(text))


def decode(node: Any) -> Any:
    """`from_json` for text that is already parsed, such as a part of a run document."""
    try:
        return _decode(node, Any)
    except RecursionError as error:
        raise ConfigError("saved config: is nested too deeply; it was not written by jvgen.") from error


def stable_name(cls: type) -> str:
    """Name of a config class in saved configs: the class name for jvgen's own, `module:Class` for a user's."""
    if HOMES.get(cls.__qualname__) == cls.__module__:
        return cls.__qualname__
    return f"{cls.__module__}:{cls.__qualname__}"


def _encode(node: Any) -> Any:
    if dataclasses.is_dataclass(node):
        fields = {field.name: _encode(getattr(node, field.name)) for field in dataclasses.fields(node)}
        return {"class": stable_name(type(node)), **fields}
    if isinstance(node, enum.Enum):
        return node.value
    if isinstance(node, (tuple, list)):
        return [_encode(item) for item in node]
    if isinstance(node, dict):
        return {"mapping": {key: _encode(item) for key, item in node.items()}}
    return node


def _decode(node: Any, hint: Any) -> Any:
    if isinstance(node, dict) and "class" in node:
        return _build(node)
    if isinstance(node, dict) and isinstance(node.get("mapping"), dict):
        return {key: _decode(value, Any) for key, value in node["mapping"].items()}
    if isinstance(node, list):
        return tuple(_decode(item, item_hint(hint, index)) for index, item in enumerate(node))
    for option in options(hint):
        if isinstance(option, type) and issubclass(option, enum.Enum):
            try:
                return option(node)
            except ValueError as error:
                choices = ", ".join(repr(member.value) for member in option)
                raise ConfigError(f"saved config: {node!r} is none of {option.__name__}'s {choices}.") from error
        if option is float and isinstance(node, int) and not isinstance(node, bool):
            return float(node)
    return node


def _build(node: dict[str, Any]) -> Config:
    if not isinstance(node["class"], str):
        raise ConfigError(f"saved config: class = {node['class']!r}: expected the name of a config class.")
    cls = _class_of(node["class"])
    saved = cls.upgrade({key: value for key, value in node.items() if key != "class"})
    hints = field_hints(cls)
    unknown = sorted(set(saved) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ConfigError(f"saved config: {cls.__name__} has no field {', '.join(unknown)} in this version of jvgen.")
    try:
        return cls(**{key: _decode(value, hints[key]) for key, value in saved.items()})
    except TypeError as error:
        raise ConfigError(f"saved config: {cls.__name__} lacks a field that has no default ({error}).") from error


def _class_of(name: str) -> type[Config]:
    """The class with a stable name, or with the `module:Class` name of a user's class or of version 0.1.0."""
    module, _, class_name = name.rpartition(":")
    if not module or module.split(".")[0] == "jvgen":
        class_name = RENAMED_CLASSES.get(class_name, class_name)
        if class_name not in HOMES:
            raise ConfigError(f"saved config names {name!r}, which is not a Config class of this version of jvgen.")
        module = HOMES[class_name]
        importlib.import_module(module)
    if module not in sys.modules:
        raise ConfigError(
            f"saved config names {name!r}, but its module is not imported: import it first, then load the config. "
            "Commands build classes of jvgen alone: in Python import your module, then use jvgen.load_run(RUN)."
        )
    cls = getattr(sys.modules[module], class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Config)):
        raise ConfigError(f"saved config names {name!r}, but module {module!r} has no Config class {class_name!r}.")
    return cls

"""Every number of every config and of every flag: what is not a sensible value is refused, with its name."""

import argparse
import copy
import dataclasses
import importlib
import itertools
import re
import typing
from pathlib import Path

import pytest

from jvgen import config
from jvgen.cli.arguments import frame_size
from jvgen.cli.main import build_parser
from jvgen.config import Config, ConfigError
from jvgen.field_types import field_hints, options
from jvgen.saved_config import HOMES, to_json

ROOT = Path(__file__).parents[2]
VALUES = ("nan", "inf", "-inf", "-1", "0", "1e22", "9" * 23, "fast", "none", "1,2", "")
# The values above that mean something. All others are refused, by every field.
SENSIBLE = {
    "0": """
        AlignmentConfig.distance AlignmentConfig.layer
        AdversarialConfig.norm_floor AdversarialConfig.start AdversarialConfig.weight
        AggregationConfig.initial AugmentationConfig.brightness AugmentationConfig.contrast AugmentationConfig.hue
        CaptionConfig.first_sentence CaptionConfig.sentence_dropout CaptionConfig.weights WeightStage.start_step
        WeightStage.weight
        AugmentationConfig.saturation BucketConfig.start_step CVVAEConfig.shift_factor CVVAEConfig.tile_overlap
        CheckpointConfig.keep_every ClipDiscriminatorConfig.halvings CompressiveTokenizerConfig.commitment
        DrQV2Config.discount DrQV2Config.noise_end DrQV2Config.noise_start DrQV2Config.pad DrQV2Config.random_steps
        DrQV2Config.weight_decay RecordingConfig.noise RecordingConfig.quality
        RecordingConfig.random_share
        CompressiveTokenizerConfig.dropout DataConfig.error_budget DataConfig.kind_weights DataConfig.workers
        EnhanceConfig.end EnhanceConfig.layers EnhanceConfig.start EnhanceConfig.temperature Experiment.seed
        FilterConfig.min_frames FilterConfig.min_height FilterConfig.min_width FrameTransformerConfig.action_width
        FrameTransformerConfig.attention_dropout GuidanceConfig.exponent GuidanceConfig.rescale GuidanceConfig.scale
        HomographyConfig.projection HomographyConfig.rotation HomographyConfig.scale HomographyConfig.shear
        HomographyConfig.strength HomographyConfig.translation ImageVAEConfig.shift_factor
        ImaginationConfig.fit_steps ImaginationConfig.moving_weight ImaginationConfig.perceptual_weight
        ImaginationConfig.real_ratio ImaginationConfig.reward_weight
        ReinforcementConfig.demonstrations ReinforcementConfig.failure_budget
        ImageVAETaskConfig.frames_per_clip ImageVAETaskConfig.kl_weight ImageVAETaskConfig.perceptual_weight
        InitFromConfig.step LoraConfig.dropout LRStage.start_step LRStage.warmup_steps MultiViewConfig.adapter_scale
        MultiViewConfig.caption_dropout MultiViewConfig.latent_shift MultiViewConfig.validation_timesteps
        MultiViewConfig.visualize_clips TextToVideoConfig.validation_timesteps
        MultiViewDiTConfig.adapter_rank OptimizerConfig.beta1 OptimizerConfig.beta2 OptimizerConfig.decay_fraction
        OptimizerConfig.final_fraction OptimizerConfig.multipliers OptimizerConfig.muon_momentum
        OptimizerConfig.warmup_steps OptimizerConfig.weight_decay PlannerConfig.correlation
        PlannerConfig.minimum_deviation RestartConfig.decay RestartConfig.every
        SegmentConfig.context
        SamplerConfig.eta SamplerConfig.steps_offset SamplingConfig.top_k SceneConfig.driven SceneConfig.kinds
        SceneConfig.quality SceneConfig.wander ShardingConfig.replicate_below SharedLatentsConfig.decoder_weight
        MultiViewConfig.condition_dropout MultiViewConfig.condition_noise_mean MultiViewConfig.condition_noise_std
        TextToVideoConfig.condition_dropout TextToVideoConfig.condition_noise_mean TextToVideoConfig.condition_noise_std
        SharedLatentsConfig.encoder_weight TextToVideoConfig.caption_dropout TextToVideoConfig.latent_shift
        TextToVideoConfig.visualize_clips TimestepConfig.mean TrainingConfig.evaluate_every TrainingConfig.hang_seconds
        TrainingConfig.max_consecutive_skips TrainingConfig.max_skips TrainingConfig.spike_patience
        TrainingConfig.spike_sigma TrainingConfig.spike_warmup TrainingConfig.visualize_every
        VideoTokenizerConfig.moving_weight VideoTokenizerConfig.perceptual_weight VideoVAETaskConfig.kl_weight
        VideoVAETaskConfig.perceptual_weight
        WorldModelConfig.action_reconstruction_weight WorldModelConfig.evaluation_samples
        WorldModelConfig.reward_weight WorldModelConfig.visualize_clips
    """,
    "-1": """
        AggregationConfig.initial CVVAEConfig.shift_factor EnhanceConfig.layers EnhanceConfig.temperature
        GuidanceConfig.scale ImageVAEConfig.shift_factor MeshConfig.fsdp MultiViewConfig.adapter_scale
        MultiViewConfig.latent_shift TextToVideoConfig.latent_shift TimestepConfig.mean
        MultiViewConfig.condition_noise_mean TextToVideoConfig.condition_noise_mean
    """,
    "none": """
        AlignmentConfig.decay_steps LoraConfig.alpha
        ImaginationConfig.rows_at_once ReinforcementConfig.episode_steps
        RecordingConfig.size RecordingConfig.steps
        BucketConfig.aspects BucketConfig.frames_per_second DataConfig.tokens_per_step
        BucketConfig.end_step CVVAEConfig.tile_frames CVVAEConfig.tile_size CogVideoXVAEConfig.encode_chunk_frames
        EnhanceConfig.gain FrameTransformerConfig.tokens_per_frame InitFromConfig.step MultiViewDiTConfig.column_scale
        MultiViewDiTConfig.offset_width MultiViewDiTConfig.temporal_patch VideoDiTConfig.column_scale
        OptimizerConfig.clip_norm ScheduleConfig.snr_shift SyncConfig.heads TrainingConfig.hang_seconds
        TrainingConfig.peak_flops TrainingConfig.profile_steps VideoDiTConfig.offset_width VideoDiTConfig.temporal_patch
        MultiViewConfig.condition_noise_mean TextToVideoConfig.condition_noise_mean
    """,
    "1,2": """
        AugmentationConfig.crop_area AugmentationConfig.crop_ratio BucketConfig.aspects
        BucketConfig.strides CVDCheckpointConfig.channels
        CVVAEConfig.time_levels_down CVVAEConfig.time_levels_up EnhanceConfig.layers
        FrameTransformerConfig.tokens_per_frame PlannerConfig.standard_deviation SceneConfig.objects
        TrainingConfig.profile_steps
    """,
    "": "CVDCheckpointConfig.channels EmaConfig.decays EnhanceConfig.layers",
}
# What a class by itself is made with, where fields have no default.
REQUIRED = {"SegmentConfig": {"choice": "shuffled", "horizon": 16}, "WeightStage": {"start_step": 10, "weight": 0.5}}
# Their fields are those of a class that is built in a config file.
SAME_FIELDS = {"TaskConfig", "TextToVideoFields"}


def is_number(hint: object) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(is_number(part) for part in typing.get_args(hint))


def is_mapping(hint: object) -> bool:
    return any(typing.get_origin(option) is dict for option in options(hint))


def numbers(node: object, path: str = ""):
    """Class, field and dotted path of every number below a config."""
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            hint, where = field_hints(type(node))[field.name], f"{path}.{field.name}".lstrip(".")
            if is_number(hint):
                yield f"{type(node).__name__}.{field.name}", f"{where}.image" if is_mapping(hint) else where
            yield from numbers(getattr(node, field.name), where)
    elif isinstance(node, (tuple, dict)):
        for name, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(item, f"{path}.{name}")


@pytest.fixture(scope="module")
def fields() -> dict[str, list[tuple[Config, str]]]:
    """For every number of every config class, configs that have it (a shipped one, one by itself), and its path."""
    found: dict[str, list[tuple[Config, str]]] = {}
    for file in sorted((ROOT / "configs").glob("*.py")):
        for choice in config.variants(file):
            experiment = config.load(choice)
            for name, path in numbers(experiment):
                found.setdefault(name, [(experiment, path)])
    for name, home in HOMES.items():
        cls = getattr(importlib.import_module(home), name)
        made = REQUIRED.get(name, {} if not any(is_required(field) for field in dataclasses.fields(cls)) else None)
        if made is not None:
            for field, path in numbers(alone := cls(**made)):
                # Of its own fields alone: those of a part are tried with its class.
                if field.startswith(f"{name}."):
                    found.setdefault(field, []).append((alone, path))
    return found


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def test_every_number_of_every_config_class_is_tried(fields):
    wanted = {
        f"{name}.{field.name}"
        for name, home in HOMES.items()
        if name not in SAME_FIELDS
        for cls in [getattr(importlib.import_module(home), name)]
        for field in dataclasses.fields(cls)
        if is_number(field_hints(cls)[field.name])
    }
    assert wanted == fields.keys()
    assert len(wanted) * len(VALUES) > 2500
    listed = {name for names in SENSIBLE.values() for name in names.split()}
    assert listed <= wanted


@pytest.mark.parametrize("value", VALUES)
def test_a_number_that_is_not_sensible_is_refused_by_name(fields, value):
    """By each config that has it; a sensible one is taken by at least one of them, since other fields may need more."""
    sensible, wrong = set(SENSIBLE.get(value, "").split()), []
    for name, places in fields.items():
        refused = []
        for whole, path in places:
            try:
                config.validate_tree(config.override(whole, [f"{path}={value}"]))
            except ConfigError as error:
                message, (above, _, field) = str(error), path.removesuffix(".image").rpartition(".")
                refused.append(message)
                if path not in message and not (above.rpartition(".")[2] in message and field in message):
                    wrong.append(f"{name}: {message}")
        if name in sensible and len(refused) == len(places):
            wrong.append(f"{name}: {refused}")
        if name not in sensible and len(refused) < len(places):
            wrong.append(f"{name} = {value}: was accepted. Declare a rule in its annotation, or list it in SENSIBLE.")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "finite"), (float("inf"), "finite"), (-(10**12), "must be (at least|positive|above)")],
)
def test_every_validate_checks_the_rules_of_its_fields(fields, value, words):
    """Also of configs that Python code made, and where no whole tree is checked."""
    for whole, path in itertools.chain.from_iterable(fields.values()):
        node, (*parts, field) = whole, path.removesuffix(".image").split(".")
        for part in parts:
            node = node[int(part)] if isinstance(node, tuple) else getattr(node, part)
        broken = {"image": value} if path.endswith(".image") else value
        changed = copy.copy(node)
        # Not by its constructor, whose types are checked in tests.
        object.__setattr__(changed, field, broken)
        with pytest.raises(ConfigError, match=rf"^{field}(\.image)? = .*{words}"):
            changed.validate()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"learning_rate": 0.005', '"learning_rate": NaN', "optimizer.learning_rate = nan: expected a finite number"),
        ('"beta2": 0.95', '"beta2": -Infinity', "optimizer.beta2 = -inf: expected a finite number"),
        ('"steps": 280', '"steps": 1e22', "training.steps = 1e+22: expected int, got float"),
        ('"height": 32', '"height": 999999999', "data.buckets.0.height = 999999999: must be at most 16384"),
        ('"threads": 2', '"threads": 100000000', "data.threads = 100000000: must be at most 1024"),
        ('"sample_size": 32', '"sample_size": -4', "task.network.sample_size = -4: must be at least 1"),
        ('"parameters": ".*"', '"parameters": "("', "ema.parameters = '(': not a regular expression"),
        ('"keep_last": 2', '"keep_last": "2"', "checkpoint.keep_last = '2': expected int, got str"),
        ('"class": "DataConfig"', '"class": 3', "class = 3: expected the name of a config class"),
        ('"class": "DataConfig"', '"class": "Path"', "'Path', which is not a Config class"),
        ('"threads": 2', '"threads": {"a": 1}', "data.threads = {'a': 1}: expected int, got dict"),
        ('"threads": 2', '"thread": 8', "DataConfig has no field thread"),
    ],
)
def test_saved_configs_are_checked_alike(before, after, message, tmp_path, jvgen):
    text = to_json(config.override(config.load(ROOT / "configs" / "demo_image_vae.py"), ["training.steps=280"]))
    assert before in text, [line for line in text.splitlines() if before.partition(":")[0] in line]
    file = tmp_path / "config.json"
    file.write_text(text.replace(before, after, 1))
    done = jvgen("config", "show", file)
    assert done.status == 2 and message in done.err and "Traceback" not in done.err, done.err


@dataclasses.dataclass(frozen=True, kw_only=True)
class Users(Config):
    """A config class without any rule."""

    rate: float = 1.0
    count: int = 3
    many: tuple[float, ...] = (1.0,)
    named: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    either: float | str | None = None
    on: bool = False


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"rate": float("nan")}, "rate = nan: expected a finite number"),
        ({"rate": 1e22}, "rate = 1e+22: must be at most 1000000000"),
        ({"count": 2**31}, "count = 2147483648: must be at most 2147483647"),
        ({"many": (1.0, float("inf"))}, r"many.1 = inf: expected a finite number"),
        ({"named": {"a": (1.0, float("-inf"))}}, r"named.a.1 = -inf: expected a finite number"),
        ({"either": float("nan")}, "either = nan: expected a finite number"),
    ],
)
def test_numbers_without_a_rule_are_finite_and_of_a_sane_size(changes, path):
    config.validate_tree(Users(either="nan", on=True))
    with pytest.raises(ConfigError, match=re.escape(path)):
        config.validate_tree(Users(**changes))


PATTERNS = {
    "optimizer.frozen=(": ["optimizer.frozen.0 = '('", "position 0", "unterminated subpattern"],
    "optimizer.frozen=a,(b": ["optimizer.frozen.1 = '(b'", "position 0"],
    "optimizer.frozen=[": ["optimizer.frozen.0 = '['", "position 0", "unterminated character set"],
    "optimizer.no_weight_decay=a**": ["optimizer.no_weight_decay.0", "multiple repeat", "position 2"],
    "optimizer.muon_exclude=(?P<1>x)": ["optimizer.muon_exclude.0", "position 4"],
    "optimizer.multipliers.(=1": ["optimizer.multipliers = '('", "position 0"],
    "checkpoint.accept_changes=[": ["checkpoint.accept_changes.0 = '['", "position 0"],
    "checkpoint.accept_changes=x)": ["checkpoint.accept_changes.0 = 'x)'", "unbalanced parenthesis", "position 1"],
    "ema.parameters=(": ["ema.parameters = '('", "position 0"],
    "ema.parameters=*": ["ema.parameters = '*'", "nothing to repeat", "position 0"],
    "init_from.parameters=[a": ["init_from.parameters = '[a'", "position 0"],
}


@pytest.mark.parametrize("assignment", PATTERNS)
def test_a_regular_expression_is_compiled_when_it_is_read(assignment):
    experiment = config.load(ROOT / "configs" / "demo_image_vae.py")
    with pytest.raises(ConfigError) as error:
        config.override(experiment, [assignment])
    missing = [word for word in PATTERNS[assignment] if word not in str(error.value)]
    assert not missing, (missing, str(error.value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ab]", ("[ab]",)),
        ("(a|b),c", ("(a|b)", "c")),
        ("a{1,2},b", ("a{1,2}", "b")),
        ("('a,b', 'c')", ("a,b", "c")),
        ("()", ()),
        ("", ()),
    ],
)
def test_brackets_and_commas_of_a_regular_expression_stay(text, expected):
    experiment = config.load(ROOT / "configs" / "demo_image_vae.py")
    assert config.override(experiment, [f"optimizer.frozen={text}"]).optimizer.frozen == expected


# Flags.

FLAG_VALUES = ("nan", "inf", "-inf", "-1", "0", "1e22", "9" * 23, "fast", "", "1_0", "٣x", "1.5")
SENSIBLE_FLAGS = {
    "0": """
        --action-scale --camera-distance --crf --enhance --error-budget --grace-seconds --guidance --limit
        --max-restarts --min-frames --min-height --min-width --process-id --record --samples --seed --start-frame --step
        --tolerance --train --validation --validation-fraction --worst
    """,
    "-1": "--action-scale --camera-distance --enhance --guidance",
    "1_0": None,
    "1.5": "--action-scale --camera-distance --enhance --file-timeout --fps --guidance --tolerance",
}


def actions(parser: argparse.ArgumentParser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from actions(child)
        else:
            yield parser.prog, action


FLAGS = [
    (prog, action) for prog, action in actions(build_parser()) if "number." in getattr(action.type, "__qualname__", "")
]


def test_no_flag_takes_any_number():
    assert len(FLAGS) > 50
    assert not [(prog, a.option_strings) for prog, a in actions(build_parser()) if a.type in (int, float)]


@pytest.mark.parametrize("value", FLAG_VALUES)
def test_a_number_of_a_flag_that_is_not_sensible_is_refused(value):
    names = SENSIBLE_FLAGS.get(value, "")
    sensible, wrong = None if names is None else set(names.split()), []
    for prog, action in FLAGS:
        flag = action.option_strings[0]
        try:
            action.type(value)
        except argparse.ArgumentTypeError as error:
            if (sensible is not None and flag in sensible) or repr(value) not in str(error):
                wrong.append(f"{prog} {flag}: {error}")
        else:
            if sensible is not None and flag not in sensible:
                wrong.append(f"{prog} {flag} {value} was accepted")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text", ["16", "16x", "x16", "0x16", "16x0", "-1x16", "²x16", "99999999x16", "1.5x2", "nanxnan"]
)
def test_frame_sizes_are_checked(text):
    with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH|must be"):
        frame_size(text)


COMMANDS = {
    "sample run --out x --guidance nan": "--guidance: 'nan': expected a finite number",
    "sample run --out x --guidance inf": "--guidance: 'inf': expected a finite number",
    "sample run --out x --enhance nan": "--enhance: 'nan': expected a finite number",
    "sample run --out x --seed -1": "--seed: '-1': must be at least 0",
    "sample run --out x --seed 4294967296": "--seed: '4294967296': must be at most 2147483647",
    "sample run --out x --steps 0": "--steps: '0': must be at least 1",
    "sample run --out x --clips-per-prompt 0": "--clips-per-prompt: '0': must be at least 1",
    "evaluate run --stride 0": "--stride: '0': must be at least 1",
    "evaluate run --batches 0": "--batches: '0': must be at least 1",
    "verify exported --tolerance nan": "--tolerance: 'nan': expected a finite number",
    "verify exported --tolerance -1": "--tolerance: '-1': must be at least 0",
    "train c.py --workdir x --stop-after -1": "--stop-after: '-1': must be at least 1",
    "train c.py --workdir x --processes 0": "--processes: '0': must be at least 1",
    "train c.py --workdir x --process-id -2": "--process-id: '-2': must be at least 0",
    "compile c.py --topology v5e:2x2 --slices 0": "--slices: '0': must be at least 1",
    "play run --data x --stride 0": "--stride: '0': must be at least 1",
    "data build scenes --out x --train 1e22": "--train: '1e22': expected a whole number",
    "data build scenes --out x --workers 100000000": "--workers: '100000000': must be at most 1024",
    "encode a.mp4 --vae v --out x --chunk-frames 0": "--chunk-frames: '0': must be at least 1",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_with_an_impossible_number_ends_before_it_starts(words, jvgen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = jvgen(*words.split())
    assert done.status == 2 and COMMANDS[words] in done.err, done.err
    assert "Traceback" not in done.err and not list(tmp_path.iterdir())

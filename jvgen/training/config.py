"""Configs of the training loop and of checkpoints."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from jvgen.config import Config
from jvgen.nn.attention import AttentionKernel
from jvgen.value_rules import Bounds, Count, Pattern, Step, Steps, Weight

PeakFlops = Annotated[float, Bounds(above=0, at_most=1e18, fix="FLOP/s of one device, for example 459e12; or none")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig(Config):
    """Logging to Weights & Biases (package `wandb`), from process 0.

    Attributes:
      project: W&B project; none for no logging to W&B.
      entity: team or user; none for the default of the account.
      mode: "online", or "offline" to write to the run directory only (`wandb sync` uploads it later).
    """

    project: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Config):
    """What a run computes in. Parameters, EMA, softmax, norms and losses are float32 in any case; so is the optimizer's
    state, unless its `first_moment` or `second_moment` says otherwise.

    Attributes:
      compute_dtype: matrices and convolution kernels are cast to this once per step, and activations are of it.
        Products of bfloat16 operands take one pass of a matrix unit and are accumulated in float32.
      matmul_precision: of products of float32 operands, those of a float32 run and of float32 networks. "highest"
        multiplies float32 everywhere: six bfloat16 passes on TPUs, no TF32 on NVIDIA GPUs. "high": three bfloat16
        passes on TPUs, TF32 on GPUs since Ampere. "default", the fastest: one bfloat16 pass on TPUs, TF32 on GPUs since
        Ampere. CPUs multiply float32 at every level. Cameras and codebooks stay at "highest".
      float32_networks: networks (trained or frozen, by name: "vae", "tokenizer") that compute in float32 whatever
        compute_dtype is, beside those for which the task decides so.
      quantized: products of the linear layers of trained transformer blocks in 8 bits, forward and backward ("int8";
        "fp8": e4m3, gradients e5m2), by the package qwix (extra `quantized`); attention stays as it is. Evaluation
        and samples are not quantized.
    """

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    float32_networks: tuple[str, ...] = ()
    quantized: Literal["none", "int8", "fp8"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Length of the run, how a step is computed, guards and logging.

    Attributes:
      steps: length of the run in optimizer steps; learning-rate schedules end here.
      accumulation: microbatches per step; the batch size of every bucket must be a multiple of accumulation x data
        devices.
      precision: dtypes of the computation, and how float32 operands are multiplied.
      attention: kernel of attention where a network has no field for it (VAEs, iVideoGPT, DINOv2) or says auto, and
        auto would take a TPU's or GPU's own; auto leaves it at that. For a kernel that a chip computes wrongly.
      log_every: steps between lines on the console (metrics.jsonl has every step).
      evaluate_every: steps between evaluations; 0 for none.
      evaluation_batches: batches per evaluation, the same ones every time.
      visualize_every: steps between samples of the task (`Task.visualize`); 0 for none.
      spike_sigma: a step is also skipped if the gradient norm of an objective exceeds its running mean in the steps of
        the same bucket by more than spike_sigma standard deviations; 0 skips steps that are not finite and no others.
      spike_decay: decay of the running mean and variance of gradient norms.
      spike_warmup: number of steps at the start of the statistics that are never skipped as spikes; the statistics
        start at step 0 and again where a stage of the curriculum starts.
      spike_patience: after this many consecutive spikes (at most max_consecutive_skips) the next step is taken, and
        the statistics start again: the norm has a new level.
      max_consecutive_skips, max_skips: the run stops when more consecutive steps, or more steps in total, are skipped;
        spikes do not count in the total.
      hang_seconds: if a step, the reading of a batch, a batch of an evaluation or (three times as long) a save takes
        longer, the stacks of all threads are printed; 0 turns this watchdog off; none for the larger of 10 median steps
        and 10 minutes, and two hours before the first step.
      hang_action: "report" prints, "exit" also ends all processes with the restart code; "auto" exits if there are
        several processes, because one that hangs makes all wait for ever.
      peak_flops: bfloat16 peak of one device in FLOP/s, for the logged MFU; none for the built-in table.
      profile_steps: first step to trace with JAX's profiler, and the step before which the trace ends ("10,12" traces
        steps 10 and 11); none for no trace. The trace is in `profile/` of the run directory, for XProf.
      profile_processes: trace the "first" process, or "all".
      tensorboard: write TensorBoard files to the run directory.
      wandb: logging to Weights & Biases.
    """

    moved_fields: ClassVar[dict[str, str]] = {"compute_dtype": "precision.compute_dtype"}

    steps: Steps
    accumulation: Count = 1
    precision: PrecisionConfig = PrecisionConfig()
    attention: AttentionKernel = AttentionKernel.AUTO
    log_every: Steps = 10
    evaluate_every: Step = 0
    evaluation_batches: Count = 8
    visualize_every: Step = 0
    spike_sigma: Weight = 0.0
    spike_decay: Annotated[float, Bounds(above=0, below=1, fix="for example 0.99")] = 0.99
    spike_warmup: Step = 100
    spike_patience: Step = 5
    max_consecutive_skips: Step = 10
    max_skips: Step = 100
    hang_seconds: Annotated[float, Bounds(at_least=0, at_most=1e7, fix="0 turns the watchdog off")] | None = None
    hang_action: Literal["auto", "report", "exit"] = "auto"
    peak_flops: PeakFlops | None = None
    profile_steps: tuple[Step, Step] | None = None
    profile_processes: Literal["first", "all"] = "first"
    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()

    @classmethod
    def upgrade(cls, saved: dict[str, Any]) -> dict[str, Any]:
        saved = super().upgrade(saved)
        if "compute_dtype" in saved:
            dtype = saved.pop("compute_dtype")
            saved["precision"] = {"class": PrecisionConfig.__name__, "compute_dtype": dtype}
        return saved

    def validate(self) -> None:
        if self.profile_steps is not None and self.profile_steps[0] >= self.profile_steps[1]:
            raise ValueError(
                f"profile_steps = {self.profile_steps}: the first step and the step after the last one, for example "
                "10,12; or none."
            )
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ValueError(f"peak_flops = {self.peak_flops}: FLOP/s of one device, for example 459e12; or none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFromConfig(Config):
    """Which parameters a new run takes from another run of jvgen, at step 0; the learning rate schedule starts anew.

    Used once: a run that has a checkpoint resumes from it.

    Attributes:
      run: run directory, or one checkpoint of it (RUN/checkpoints/STEP), to take them from; none for random
        initialization.
      step: of its checkpoint; none for the latest valid one.
      parameters: regular expression of the parameters to take, matched from the start of their paths; the others are
        initialized randomly.
      ema: the EMA with this decay ("0.9999"), the "raw" parameters, or "best": the EMA with the largest decay that the
        run keeps, raw if it keeps none.
      keep_optimizer: also take the optimizer state, the EMA of each decay that both runs keep and the number of
        updates, by which EMA decays warm up (needs ema="raw"). Otherwise these start anew. An EMA that is not taken
        starts from the parameters.
      allow_partial: initialize parameters randomly that `parameters` selects and the other run lacks or has in another
        shape, such as those of a new module; each is logged.
    """

    run: str | None = None
    step: Step | None = None
    parameters: Pattern = ".*"
    ema: str = "raw"
    keep_optimizer: bool = False
    allow_partial: bool = False

    def validate(self) -> None:
        if self.keep_optimizer and self.ema != "raw":
            raise ValueError(f'keep_optimizer = true: moments belong to the raw parameters, not to ema = "{self.ema}".')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """When checkpoints are written, which are kept, and what happens if one cannot be written.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep_last: number of latest checkpoints to keep; with two or more a corrupt one can be replaced by the one before.
      keep_every: also keep checkpoints whose step is a multiple of this; 0 for none.
      best_metric: also keep the checkpoint with the best value of this evaluation metric ("loss", "ema_0.9999/psnr");
        none for no such rule. Every saved step must be one at which evaluation is due; a step is saved first and then
        evaluated, so the latest checkpoint is kept whatever its value.
      best_mode: whether the smallest or the largest value is best.
      on_failed_save: "continue" logs a warning and trains on, "stop" ends the run; older checkpoints stay either way.
      max_failed_saves: the run ends after this many failed saves in a row.
      accept_changes: regular expressions of dotted config paths that may differ from the checkpoint's when resuming,
        for settings that change the program and not the result.
    """

    every: Steps = 1000
    keep_last: Count = 2
    keep_every: Step = 0
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    on_failed_save: Literal["continue", "stop"] = "continue"
    max_failed_saves: Count = 3
    accept_changes: tuple[Pattern, ...] = (r".*\.remat$", r"data\.(threads|workers|prefetch|error_budget)$")

    def validate(self) -> None:
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every = {self.keep_every}: must be a multiple of every = {self.every}, or nothing is kept."
            )

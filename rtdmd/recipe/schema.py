"""The typed shape of a recipe; defaults are the published settings that all models share.

Every field's unit is in its name or its comment. Strict loading is in ``loading.py``, checks that
span fields are in ``checks.py``. Paths are relative to the working directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Trains = Literal["lora", "full"]
RewardMode = Literal["default", "official"]
Checkpointing = Literal["none", "selective", "full", "auto"]
Compile = Literal["none", "blocks", "network"]
CompileLayers = Literal["none", "blocks"]
TextEncoder = Literal["device", "offload", "once"]
Engines = Literal["separate", "shared_base"]
Gather = Literal["auto", "collective", "copies"]

# Those of them that a recipe has carry the gradient, unless it names others.
DEFAULT_BACKPROP_REWARDS = ("clipscore", "hpsv2", "pickscore")


@dataclass(frozen=True)
class ModelSection:
    """Family, components that all roles share, resolution."""

    family: str
    pipeline: str  # diffusers pipeline folder or hub id: text encoders, tokenizers, VAE, schedule
    height: int
    width: int
    guidance_scale: float  # the teacher's classifier-free guidance w; 1 is no guidance
    revision: str | None = None  # hub revision of `pipeline`
    max_sequence_length: int | None = None  # text tokens; null is the family's own
    # A stage's prompts are encoded once and kept on each device if all fit into this; else as they come.
    prompt_embeddings_gib: float = 1.0
    # Where text encoders wait: on the device; offload: in host memory, moved to the device for each use;
    # once: nowhere, all of a stage's prompts are encoded at its start and must fit prompt_embeddings_gib.
    text_encoder: TextEncoder = "device"
    text_encoder_compile: CompileLayers = "none"  # by torch.compile, each layer by itself


@dataclass(frozen=True)
class TeacherSection:
    """The frozen network that sees guidance."""

    engine: str  # DeepSpeed JSON
    weights: str | None = None  # pipeline folder or hub id; null is model.pipeline
    revision: str | None = None
    compile: Compile = "none"  # by torch.compile: each block by itself, or the network as one graph


@dataclass(frozen=True)
class TrainedSection:
    """A network that trains: generator or fake score."""

    engine: str
    weights: str | None = None
    revision: str | None = None
    trains: Trains = "lora"
    # Blocks recomputed in backward; selective: every other; auto: as few as the GPU's memory allows, measured
    # on the stage's first updates (without a GPU none).
    activation_checkpointing: Checkpointing = "full"
    compile: Compile = "none"


@dataclass(frozen=True)
class RolesSection:
    """The three networks, each in an engine of its own, or those with the same weights on one base."""

    teacher: TeacherSection
    generator: TrainedSection
    fake_score: TrainedSection
    engines: Engines = "separate"  # shared_base: the same weights are in memory once, roles have LoRA on them
    # Of shared bases in ZeRO 3. copies: each GPU from the others of its machine, without a collective. auto:
    # every machine has the base once between its GPUs, copied where they have access to each other.
    gather: Gather = "auto"
    # Of each shared base in ZeRO 3, blocks that stay whole on every GPU once gathered, besides its ends;
    # null: as many as the GPU's memory allows, measured on a stage's first updates (without a GPU none).
    whole_blocks: int | None = None


def role_weights(model: ModelSection, role: TeacherSection | TrainedSection) -> tuple[str, str | None]:
    """Folder or hub id and revision of a role's base weights: its own, else the model's pipeline."""
    if role.weights:
        return role.weights, role.revision
    return model.pipeline, role.revision or model.revision


@dataclass(frozen=True)
class InitStdSection:
    """Standard deviation of LoRA's A per stage; null is 1/rank. B starts at 0."""

    cold_start: float | None = None
    rtdmd: float | None = 1.0


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters of the roles whose `trains` is lora."""

    rank: int = 32
    alpha: float = 64.0
    targets: list[str] | None = None  # suffixes of module names; null is the family's own
    init_std: InitStdSection = field(default_factory=InitStdSection)


@dataclass(frozen=True)
class ScheduleSection:
    """The generator's few steps and the CPS transition between them."""

    timesteps: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])  # before the shift
    shift: float | None = None  # null is the family's own
    eta: float = 0.9  # stochasticity in [0, 1]


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW with gradient clipping; the learning rate is constant up to the cooldown."""

    learning_rate: float
    cooldown: float = 0.0  # last share of the stage's steps, over which the rate falls linearly to 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class PromptsSection:
    """Text file (one prompt a line), jsonl, parquet, a folder of them, or a hub dataset id."""

    source: str
    column: str | None = None  # null: `prompt`, `text` or `caption`, whichever is there
    split: str = "train"  # of a hub dataset
    unique: bool = False  # keep only the first row of each prompt
    limit: int | None = None  # use the first so many prompts


@dataclass(frozen=True)
class ColdStartSection:
    """Stage 1, AC-DMD."""

    generator: OptimizerSection
    fake_score: OptimizerSection
    prompts: PromptsSection
    iterations: int = 15_000
    batch_size: int = 9  # samples per rank and update
    micro_batch_size: int | None = None  # per rank; null is batch_size
    generator_every: int = 10  # iterations between generator updates
    sub_interval: bool = True  # false: plain DMD, matching at the clean picture that the last step predicts
    consistency_weight: float = 0.01
    consistency_max_timesteps: int = 200  # the regulariser goes back by U{1..this} timesteps
    min_interval_timesteps: float = 10.0  # t >= 1000*s + this
    timestep_range: list[float] = field(default_factory=lambda: [20.0, 980.0])  # t is clamped to it
    ema_decay: float = 0.904  # per generator update
    checkpoint_every: int = 500  # iterations
    sample_every: int = 500


@dataclass(frozen=True)
class RewardBackpropSection:
    """Reward back-propagation through the final-step decoder."""

    weight: float = 1e-4  # 0 switches it off
    margin: float = 3.0
    rewards: list[str] | None = None  # null: clipscore, hpsv2, pickscore, as far as the recipe has them
    standardize: bool = False  # (r - mean)/std of each reward before the weighted sum and the margin
    statistics_decay: float = 0.9  # of these means and stds, per epoch
    micro_batch_size: int = 1  # pictures whose decoder and reward graphs exist at once
    recompute_decoder: bool = True  # false: keeps the decoder's activations, faster and of twice the size


@dataclass(frozen=True)
class StopRuleSection:
    """Ends the stage when a metric's running mean has long been below its best."""

    metric: str  # as logged: reward/NAME, monitor/NAME, image/NAME
    drop: float  # below the best running mean
    patience: int = 40  # epochs for which the drop has to last
    window: int = 5  # logged values that the running mean is over


@dataclass(frozen=True)
class RtdmdSection:
    """Stage 2, RTDMD: SubGRPO, AC-DMD on the last step, reward back-propagation."""

    generator: OptimizerSection
    fake_score: OptimizerSection
    prompts: PromptsSection
    start_generator: str | None = None  # a cold start's generator_ema.pt; null is this run's own
    start_fake_score: str | None = None  # likewise fake_score.pt; null: this run's, or the base beside a file
    epochs: int = 1_000  # generator updates
    sample_batch_size: int = 6  # per rank
    num_sample_batches: int = 16  # per epoch
    images_per_prompt: int = 24  # K
    micro_batch_size: int | None = None  # generator training, per rank; null is sample_batch_size
    fake_score_micro_batch_size: int | None = None  # null is sample_batch_size
    score_batch_size: int | None = None  # pictures decoded and scored at once; null is sample_batch_size
    num_policy_steps: int = 2  # stochastic steps drawn per epoch (SubGRPO); 3 of 4 steps is plain GRPO
    shared_noise: bool = True  # the stochastic steps that aren't drawn have the noise of their prompt
    policy_weight: float = 1.0  # 0 switches the policy gradient off
    clip_range: float = 1e-5
    advantage_clip: float = 5.0
    advantage_global_std: bool = True
    old_log_prob: Literal["training", "rollout"] = "training"
    distribution_matching_weight: float = 1e-3
    # Where distributions are matched: after the last step, as published, or after each that an epoch trains,
    # there with the same weight each, while the fake score's loss is the mean over these states.
    matched_steps: Literal["last", "trained"] = "last"
    consistency_weight: float = 0.01
    consistency_max_timesteps: int = 200
    min_interval_timesteps: float = 10.0
    timestep_range: list[float] = field(default_factory=lambda: [20.0, 980.0])
    reward_backprop: RewardBackpropSection = field(default_factory=RewardBackpropSection)
    ema_decay: float = 0.81  # reached by the warm-up min((1+n)/(10+n), decay)
    monitor_every: int = 10  # epochs between looks at monitor_rewards and at what the pictures are like
    stop_when: list[StopRuleSection] = field(default_factory=list)  # any of them; the first picks the best
    checkpoint_every: int = 20  # epochs
    sample_every: int = 20

    @property
    def matches_drawn(self) -> bool:
        """Whether distributions are matched after the drawn steps, too."""
        return self.matched_steps == "trained"

    @property
    def trains_drawn(self) -> bool:
        """Whether the generator is evaluated with gradient at the drawn steps."""
        return self.policy_weight > 0 or self.matches_drawn


@dataclass(frozen=True)
class RewardSection:
    """One reward model."""

    name: str
    weight: float = 1.0
    weights: str | None = None  # folder or hub id; null is the published one
    revision: str | None = None
    mode: RewardMode = "default"  # official: with the quirks of the published code, where it has some
    clip: list[float] | None = None  # [low, high]: training takes a score beyond a bound for the bound
    url: str | None = None  # of an `rtdmd serve-rewards` that scores; null: this process does
    timeout_seconds: float = 60.0  # of a request to the url
    retries: int = 3  # of a request that got no answer
    token_file: str | None = None  # holds what the url's server asks for


@dataclass(frozen=True)
class PreviewSection:
    """Sample grids during training."""

    prompts: list[str] = field(default_factory=list)  # empty: the first eight of the stage's prompts
    num_images: int = 8


@dataclass(frozen=True)
class EvaluationSetSection:
    """A set of prompts to evaluate on."""

    name: str
    prompts: PromptsSection
    category: str | None = None  # column with each prompt's category; null: found by its name
    num_images_per_prompt: int | None = None  # null is evaluation.num_images_per_prompt


@dataclass(frozen=True)
class EvaluationModelSection:
    """A model to evaluate."""

    name: str
    model: str  # base, teacher:steps=50,guidance=4, run:FOLDER, run:FOLDER@cold_start, lora:A.pt+B.pt


@dataclass(frozen=True)
class EvaluationSection:
    """What ``rtdmd evaluate`` does, and what training measures now and then."""

    sets: list[EvaluationSetSection] = field(default_factory=list)
    models: list[EvaluationModelSection] = field(default_factory=list)  # of `rtdmd evaluate`; empty: base
    rewards: list[RewardSection] = field(default_factory=list)  # empty: the recipe's, in mode default
    height: int | None = None  # pixels; null is the model's
    width: int | None = None
    num_images_per_prompt: int | None = None  # null is 4 on GenEval's prompts, 1 on others
    batch_size: int = 4  # pictures painted and scored at once, per process
    seed: int = 0
    every: int = 0  # steps of training between two evaluations of the EMA; 0 is never


@dataclass(frozen=True)
class TrackingSection:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole model: both stages, rewards, prompts, output."""

    name: str
    model: ModelSection
    roles: RolesSection
    cold_start: ColdStartSection
    rtdmd: RtdmdSection
    rewards: list[RewardSection]
    monitor_rewards: list[RewardSection] = field(default_factory=list)  # scored and logged, never trained on
    reward_workers: int = 0  # processes per rank and reward that needs the CPU alone (ocr, say); 0: none
    lora: LoraSection = field(default_factory=LoraSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    preview: PreviewSection = field(default_factory=PreviewSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    stages: list[Literal["cold_start", "rtdmd"]] = field(default_factory=lambda: ["cold_start", "rtdmd"])
    seed: int = 0
    dtype: Dtype = "bfloat16"  # of networks and their activations; masters, losses and EMA are float32
    output: str = "runs"  # the run's folder is output/name
    resume: Literal["auto", "never"] = "auto"
    timeout_seconds: float = 1800.0  # without progress on a rank, all ranks stop and say who waits where
    keep_checkpoints: int = 2  # per stage

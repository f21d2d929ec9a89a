"""The card's prose."""

PAPER = "https://arxiv.org/abs/2605.26108"

ABSTRACT = """\
A text-to-image model trained by flow matching usually needs 50 or more network evaluations a picture,
and twice as many with guidance. This generator needs {steps} and no guidance. It was trained by
Reward-Tilted Distribution Matching Distillation ([RTDMD]({paper})): the divergence between the
generator's pictures and those of the teacher, tilted towards what reward models prefer, falls into two
parts that can be trained together, matching the teacher's distribution and raising the reward."""

METHODS = {
    "cold_start": """\
**Cold start** (AC-DMD). The generator follows the difference between the teacher's velocity and that of
a *fake score*, a network that keeps learning what the generator paints at the moment. Both are compared
at noise levels above the one at which the few-step trajectory was stopped, so that every step of it is
trained. The fake score learns from these intermediate states directly (ambient score matching), with a
term that asks its predictions from neighbouring noise levels to agree.""",
    "rtdmd": """\
**RTDMD**. The steps that draw noise are trained as a policy: pictures of one prompt are compared in
groups, and only some of the steps are drawn and trained in each update. The last step draws none; there
the distribution is matched as before, and differentiable rewards are propagated back through the
decoder.""",
}

LIMITS = """\
- It paints at {width}x{height} pixels with {steps} steps and guidance 1, which is what it was trained
  for. Other sizes, numbers of steps and guidance are untested.
- Few-step generators vary less from seed to seed than their teacher.
- A model that was trained on rewards may please reward models more than people, and may have learnt
  what they mistake for quality. Compare with rewards that took no part in training.
- It has the base model's biases and gaps (text, counting, hands, people and places), and no safety
  filter of its own."""

TRANSITIONS = """\
The generator was trained with the transitions of `CPS`: each step but the last draws most of its noise
anew (eta {eta}). `pipe.scheduler.generator` may be set to a `torch.Generator`."""

STAGES = """\
The file at the top holds both stages. Each stage's own file can be loaded under a name of its own, and
both made active. Loading one over the other under the *same* name replaces it: that does not stack."""

LICENCE = """\
Derived from {base} and, like it, under the {licence}: read it before you use or pass on these weights.
The licences of the text encoders, of the teacher and of the reward models used in training hold
besides."""

UNKNOWN_LICENCE = """\
Derived from {base} and bound by its licence, which is not known here. The licences of the text
encoders, of the teacher and of the reward models used in training hold besides."""

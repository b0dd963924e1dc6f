"""Whether the learning rates of a run can be what its flags say: what cannot is said at the start."""

from __future__ import annotations

import math

from lape.errors import LapeError
from lape.recipe import Recipe
from lape.train.progress import Say
from lape.train.state import State, set_rate

NEAR = 0.9  # of the peak: as good as reached
DECAYS = ("cosine", "tanh", "poly")  # those that end at --min-lr


def fit_warm_up(recipe: Recipe, say: Say, *, explicit: bool | None = None) -> Recipe:
    """Shorten a warm-up that fills the schedule to a fifth of it, unless the user gave its length.

    `explicit`: whether the user did; default: where the recipe names it.
    """
    epochs, warm_up = recipe.schedule_epochs or recipe.epochs, recipe.warmup_epochs
    if recipe.sched == "none" or warm_up < epochs:
        return recipe
    what = f"The warm-up is longer than the run allows: {warm_up} of {epochs} epochs"
    if "warmup_epochs" in recipe.model_fields_set if explicit is None else explicit:
        say(f"{what}, as --warmup-epochs says; the learning rate does not reach its peak")
        return recipe
    say(f"{what}; shortened to {epochs // 5} (--warmup-epochs overrides)")
    return recipe.replace(warmup_epochs=epochs // 5)


def remarks(recipe: Recipe, peak: float, state: State) -> list[str]:
    """What the schedule does that its flags do not lead one to expect, a line each. Raises LapeError for a peak that is
    not finite."""
    if not math.isfinite(peak):
        raise LapeError(f"lr={recipe.lr} scaled by the total batch is {peak}: lower --lr, or use --unscale-lr")
    lines = []
    if recipe.sched in DECAYS and not peak >= recipe.min_lr:
        lines.append(
            f"The learning rate's peak of {peak:.4g} is below --min-lr {recipe.min_lr:.4g}: it rises where it should "
            "decay; raise --lr or lower --min-lr"
        )
    if recipe.sched != "none" and recipe.warmup_epochs and not peak >= recipe.warmup_lr:
        lines.append(
            f"The learning rate's peak of {peak:.4g} is below --warmup-lr {recipe.warmup_lr:.4g}: the warm-up falls; "
            "raise --lr or lower --warmup-lr"
        )
    if recipe.sched == "step" and recipe.decay_epochs >= recipe.epochs:
        lines.append(f"No epoch is behind --decay-epochs {recipe.decay_epochs:g}: the learning rate does not decay")
    if state.next_epoch == 0 and (highest := max(_rates(recipe, state))) < NEAR * peak:
        lines.append(f"No epoch trains at the learning rate's peak of {peak:.4g}: the highest is {highest:.4g}")
    return lines


def _rates(recipe: Recipe, state: State) -> list[float]:
    """The learning rate of each epoch, from the first on, which is next; the state is left as it was."""
    groups = state.optimizer.param_groups
    rates_before, rates = [group["lr"] for group in groups], [groups[0]["lr"]]
    if state.scheduler is not None:
        for epoch in range(1, recipe.epochs):
            set_rate(state, recipe, epoch)
            rates.append(groups[0]["lr"])
        for group, lr in zip(groups, rates_before, strict=True):
            group["lr"] = lr
    return rates

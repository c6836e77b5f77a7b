"""MergeMoE (arXiv 2510.14436): average a group's gate and up, then fit its down projection to what the group gave.

With p(x) the hidden activations of the averaged gate and up, the down projection D minimises, over calibration tokens,

    published:  sum_t || D p(x_t) - sum_e b_e D_e h_e(x_t) ||^2           over all tokens that reach the group
    routed:     sum_t || G_t D p(x_t) - sum_{e chosen by t} g_te D_e h_e(x_t) ||^2,    G_t = sum_{e chosen} g_te

b_e are usage shares and g_te gate weights. `published` is the paper's T1 = Q P^+ (section 3.2) with D = [b_e D_e] T1;
`routed` is what the merged layer is asked for: the router's weights of a group add up on one expert. Both are fitted as
a correction to the average, D = D_avg + R P^T (P P^T + ridge I)^-1, so that a group of one expert stays exactly as it
is, and little text falls back to the average instead of to noise. Sums over tokens are all that is kept.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from moefold import Activity, Context, Experts, Groups, Layer, Reduced, Routed, Stage, hookimpl, stage
from moefold_plugins.averaging import averaged, usage
from moefold_plugins.fitting import Fit, Sums, passes, solve

Target = Annotated[
    Literal["routed", "published"],
    Field(description="what to fit: each token's own gate-weighted experts, or the group's usage-weighted mean"),
]
Ridge = Annotated[
    float | Literal["auto"],
    Field(description="pull towards the average, in units of P P^T's mean diagonal; auto: chosen on held-out tokens"),
]


@stage("mergemoe", keep="until read")
def mergemoe(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    groups: Groups,
    activity: Activity,
    context: Context,
    *,
    target: Target = "routed",
    tokens: Annotated[
        Literal["group", "all"], Field(description="published: fit on the tokens that reach the group, or on all")
    ] = "group",
    ridge: Ridge = "auto",
    anchor: Annotated[
        Literal["average", "zero"], Field(description="what the ridge pulls to; zero: the paper's plain least squares")
    ] = "average",
) -> Reduced:
    """Merge each group into one expert whose down projection is fitted to the group's outputs."""
    experts = experts.to(context.device)
    shares = usage(groups, activity)
    merged = averaged(experts, groups, shares)
    wanted = {number: group for number, group in enumerate(merged.groups) if len(group) > 1}
    if anchor == "zero":
        merged.down[list(wanted)] = 0
    fits: dict[int, Fit] = {}
    for part in passes(wanted, experts):
        for number, sums in Sums.gather(layer, routed, experts, merged, part, shares, target, tokens).items():
            fits[number] = solve(sums, ridge)
            merged.down[number] += fits[number].correction.to(merged.down.dtype)
    thin = [number for number, fit in fits.items() if fit.tokens < merged.inner]
    merged.figures.update({"fits": {str(n): fit.facts() for n, fit in sorted(fits.items())}, "thin": thin})
    return merged


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [mergemoe]

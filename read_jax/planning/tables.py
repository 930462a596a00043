"""Plans in words."""

from __future__ import annotations

from collections.abc import Sequence

from read_jax.planning.chips import GIB
from read_jax.planning.hlo import BETWEEN_SLICES
from read_jax.planning.inference import InferencePlan
from read_jax.planning.plan import UTILISATIONS, Candidate, Plan

_SHOWN = 12  # candidates


def plan_text(plan: Plan, *, pictures: int | None = None, price: float | None = None) -> str:
    """A plan for people.

    pictures: of an epoch. price: of a chip for an hour, in dollars.
    """
    chip, memory = plan.chip, plan.memory
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"fits: {'yes' if plan.fits else 'no'}",
        f"machine      {slices}{plan.topology}: {plan.devices} chips, mesh {mesh}",
        f"update       {plan.pictures} pictures x {plan.questions} questions x {plan.tokens} tokens, "
        f"{plan.micro_batches} micro-batch(es), remat {plan.remat}",
        f"memory       {_gib(memory.peak)} of {_gib(chip.memory)} per chip at the peak, "
        f"{_gib(abs(chip.memory - memory.peak))} {'to spare' if plan.fits else 'too much'}",
    ]
    if memory.arguments is not None and memory.temporaries is not None and memory.code is not None:
        lines.append(
            f"             {_gib(memory.arguments)} parameters, moments and batch, "
            f"{_gib(memory.temporaries)} temporaries, {_gib(memory.code)} program"
        )
    lines.append(f"             {_gib(plan.cost.memory)} by our own estimate")
    lines.append(
        f"arithmetic   {plan.cost.useful / 1e12:.1f} TFLOP per chip and update, "
        f"{plan.cost.done / 1e12:.1f} with what is recomputed; {plan.cost.bytes / 1e9:.0f} GB to and "
        "from its memory"
    )
    if plan.traffic is None:
        lines.append("sent         unknown: what the compiler made cannot be read")
    for kind, traffic in (plan.traffic or {}).items():
        lines.append(f"{kind:<20} {traffic.number:,} of {traffic.bytes / 1e9:.2f} GB per chip and update")
    lines += _speed(plan, pictures, price)
    lines.append(f"compiled in {plan.seconds:.0f} s")
    return "\n".join(lines)


def _speed(plan: Plan, pictures: int | None, price: float | None) -> list[str]:
    times = plan.times
    bound = max(times, key=lambda name: times[name])
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
    lines = [f"an update takes at least {times[bound]:.2f} s, bound by {bound} ({each})"]
    if plan.slices > 1 and BETWEEN_SLICES not in times:
        far, near = (speed * 8 / 1e9 for speed in (plan.chip.network, plan.chip.link))
        lines.append(
            "not counted: that the network between slices is slower than the links "
            f"({far:.0f} instead of {near:.0f} Gbit/s per chip)"
        )
    for share in UTILISATIONS:
        # a share of the peak in useful operations, but never faster than what bounds it
        seconds = max(plan.cost.useful / plan.chip.flops / share, times[bound])
        line = (
            f"at {share:.0%} of the peak: {seconds:.2f} s, {plan.pictures / seconds:.1f} pictures/s, "
            f"{plan.tokens_per_update / seconds:,.0f} tokens/s"
        )
        if pictures:
            hours = pictures / plan.pictures * seconds / 3600
            line += (
                f"; an epoch of {pictures:,} pictures {hours:.1f} h, {hours * plan.devices:.0f} chip-hours"
            )
            line += f", ${hours * plan.devices * price:,.0f}" if price else ""
        lines.append(line)
    return lines


def inference_text(plan: InferencePlan) -> str:
    """A plan to answer questions, for people."""
    load, chip = plan.load, plan.chip
    rows = load.pictures * load.questions
    spare = chip.memory - plan.peak
    shared = f"{plan.group} chips share the model" if plan.group > 1 else "one chip has the model"
    room = f", up to {load.new_tokens} new ones" if plan.mode == "serve" else ""
    lines = [
        f"fits: {'yes' if plan.fits else 'no'}",
        f"machine      {plan.topology}: {shared}; each such group answers by itself",
        f"together     {load.pictures} pictures x {load.questions} questions x {load.tokens} tokens{room}",
        f"memory       {_gib(plan.peak)} of {_gib(chip.memory)} per chip at the peak, "
        f"{_gib(abs(spare))} {'to spare' if plan.fits else 'too much'}",
        f"{'program':<14}{'peak':>11}{'arithmetic':>12}{'memory':>9}{'links':>9}   sent and gathered",
    ]
    for stage in plan.stages:
        times = stage.times(chip)
        start = f"{stage.name:<14}{_gib(stage.memory.peak):>11}{times['arithmetic']:>10.3f} s"
        start += f"{times['memory']:>7.3f} s"
        if stage.traffic is None:
            lines.append(f"{start}   unknown   what the compiler made cannot be read")
        else:
            sent = sum(traffic.bytes for traffic in stage.traffic.values())
            lines.append(f"{start}{times['links']:>7.3f} s   {sent / 1e9:.2f} GB")
    if plan.fits:
        full = ", with answers of full length," if plan.mode == "serve" else ""
        each = f"{load.pictures / plan.seconds:.1f} pictures or {rows / plan.seconds:.1f} answers per second"
        lines.append(f"all of it{full} takes at least {plan.seconds:.2f} s: at most {each} and group")
    lines.append(f"compiled in {sum(stage.seconds for stage in plan.stages):.0f} s")
    return "\n".join(lines)


def candidates_table(found: Sequence[Candidate]) -> str:
    """The best candidates of a search."""
    lines = [f"{len(found)} ways to run it, by our own count (no network); the best:"]
    lines.append(
        f"{'pictures':>8} {'data':>5} {'fsdp':>5} {'tensor':>6} {'parts':>6}  {'remat':<6} {'memory':>10} "
        f"{'update':>9} {'pictures/s':>11}  fits"
    )
    for candidate in found[:_SHOWN]:
        mesh = candidate.mesh
        lines.append(
            f"{candidate.pictures:>8} {mesh.data * mesh.slices:>5} {mesh.fsdp:>5} {mesh.tensor:>6} "
            f"{candidate.micro_batches:>6}  {candidate.remat!s:<6} {_gib(candidate.cost.memory):>10} "
            f"{candidate.seconds:>7.2f} s {candidate.rate:>11.1f}  {'yes' if candidate.fits else 'no'}"
        )
    return "\n".join(lines)


def _gib(amount: float) -> str:
    return f"{amount / GIB:.2f} GiB"

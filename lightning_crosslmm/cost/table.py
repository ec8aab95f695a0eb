"""A cost card as a table: its rows are the keys of the JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

_NOTES = """\
flops: 2 per multiply-accumulate, as torch counts; macs: multiply-accumulates. Matrix products, convolutions and
attention, that over all pairs of positions, of which a causal kernel leaves half of llm_attention out (roofline_s
counts that half).
train_step: of one sample, with what is frozen, and with what checkpointing runs again. activations, prefill: most
memory alive at once.
baseline: plain LLaVA-OneVision with this encoder, projector and LLM; nothing is cut off at the context."""


def cost_table(card: Mapping[str, Any]) -> list[str]:
    """Write a card as lines of text: every number, that of the baseline, and their ratio.

    Args:
        card: from `cost_card`.
    """
    width = 34
    lines = [f"{'':<{width}}{'this':>16}{'macs':>12}{'baseline':>16}{'ratio':>9}  bound"]
    bounds = card.get("roofline_s", {}).get("bound", {})
    for section in ("tokens", "parameters", "flops", "bytes", "roofline_s"):
        for path, number in _leaves(card.get(section, {})):
            below, ratio = (_at(card[other].get(section, {}), path) for other in ("baseline", "ratio"))
            macs = _scaled(number / 2) if section == "flops" else ""
            bound = _at(bounds, path) if section == "roofline_s" else None
            shown = [_shown(each, section) for each in (number, below)]
            ratio_text = "" if ratio is None else f"{ratio:.3f}"
            name = ".".join((section, *path))
            lines.append(
                f"{name:<{width}}{shown[0]:>16}{macs:>12}{shown[1]:>16}{ratio_text:>9}  {bound or ''}".rstrip()
            )
    if "roofline_s" in card:
        lines.append(
            f"roofline_s: least times on gpu={card['roofline_s']['gpu']} in {card['roofline_s']['computes_in']}"
        )
    return [*lines, *_warnings(card), *_NOTES.splitlines()]


def cost_page(card: Mapping[str, Any]) -> str:
    """Write a card as a page of Markdown."""
    return "\n".join(["# What this run costs", "", "```text", *cost_table(card), "```", ""])


def _warnings(card: Mapping[str, Any]) -> Iterator[str]:
    for name, tokens in (("this", card["tokens"]), ("baseline", card["baseline"]["tokens"])):
        if tokens["llm"] > tokens["context"]:
            yield f"{name}: {tokens['llm']:,} tokens are more than the LLM's context of {tokens['context']:,}"


def _leaves(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif isinstance(value, int | float):
            yield (*path, key), value


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _shown(number: float | None, section: str) -> str:
    if number is None:
        return ""
    if section == "flops":
        return _scaled(number)
    if section == "bytes":
        return f"{number / 2**20:,.1f} MiB"
    if section == "roofline_s":
        return f"{number * 1e3:,.3f} ms"
    return f"{number:,.2f}".removesuffix(".00")


def _scaled(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.3f} {unit}"
    return f"{number:,.0f}"

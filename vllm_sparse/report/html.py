"""`report.html` of a search: one file with everything in it, and no script."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from html import escape

from vllm_sparse.files import write_whole
from vllm_sparse.search.allot import MARGIN
from vllm_sparse.search.candidates import DEFAULT, ORDER, budget
from vllm_sparse.search.choose import TIE, WORTH, Choice
from vllm_sparse.search.run import Result

from .svg import BLUE, GREEN, KIND_COLOURS, RED, Cell, Row, heat_map, log_share, shade

KIND_NAMES = {
    "a_shape": "A-shape",
    "vertical_slash": "vertical-slash",
    "block_sparse": "block-sparse",
    "adaptive": "adaptive",
    "dense": "dense",
}
MEANING = {
    "a_shape": "the first and the last tokens: sink + window",
    "vertical_slash": "the heaviest columns and diagonals: columns + diagonals",
    "block_sparse": "the best blocks of 64 keys for each 64 queries: blocks",
    "adaptive": "the cheapest of the three in every chunk",
    "dense": "every key",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2126;max-width:1100px;margin:2rem auto;
padding:0 1rem;background:#fff}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{max-width:75ch;margin:.4rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;margin:.5rem 0}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #e4e7ea;vertical-align:top}
th{font-weight:600}td.l,th.l{text-align:left}.map{width:100%;height:auto;display:block}
.axis{font:12px system-ui,sans-serif;fill:#4c545c}.cell{font:11.5px system-ui,sans-serif}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 0;
vertical-align:-1px}.muted{color:#59626b}ul.legend{list-style:none;padding:0;margin:.5rem 0;
display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:.1rem 1rem;
font-size:13px}summary{cursor:pointer;color:#21568a;font-size:13px}.out{color:#a03028}
.scroll{overflow-x:auto}
"""


def write_report(result: Result, path: str | os.PathLike[str]) -> None:
    """Write the report of a search; whatever text it shows is escaped."""
    model = result.file.model
    body = [
        f"<h1>Attention patterns of {escape(model.name)}</h1>",
        f'<p class="muted">{model.layers} layers of {model.heads} query heads and '
        f"{model.kv_heads} KV heads of {model.head_size}. Searched with "
        f"{_prompts(result)} in {result.seconds / 60:.1f} minutes.</p>",
        *_summary(result),
        "<h2>Layers</h2>",
        "<p>A column for each query head. Density is the share of its causal keys that a head "
        "reads, time the share of what it costs when dense, planning included; error is that of "
        "its output, on the prompt where it is largest. Point at a cell for its numbers.</p>",
        _legend(),
    ]
    for layer in range(model.layers):
        body.append(f"<h3>Layer {layer}</h3>")
        if layer in result.choices:
            choices = result.choices[layer]
            body += [_map(layer, choices), _layer_error(choices), _details(choices)]
        elif layer in result.windows:
            body.append(
                f'<p class="muted">Looks at the last {result.windows[layer]} tokens only: vLLM\'s '
                "own backend serves it.</p>"
            )
        else:
            body.append('<p class="muted">Was not seen.</p>')
    body += _explanation(result)
    write_whole(
        path,
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>Patterns of {escape(model.name)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n",
    )


def _prompts(result: Result) -> str:
    names = ", ".join(f"{escape(p.name)} ({len(p.token_ids):,} tokens)" for p in result.prompts)
    return f"{len(result.prompts)} prompt{'s' if len(result.prompts) != 1 else ''}: {names}"


def _summary(result: Result) -> list[str]:
    heads = [c for layer in result.choices.values() for c in layer]
    if not heads:
        return ["<p>No layer of this model is served by the sparse backend.</p>"]
    kinds = Counter(c.chosen.pattern.kind for c in heads)
    said = ", ".join(f"{kinds[k]} {KIND_NAMES[k]}" for k in ORDER if kinds[k])
    lines = [f"<p>Of each head: {escape(str(result.goal))}. Of {len(heads)} heads: {said}.</p>"]
    rows = [("by the cost model, over all prompts", *_modelled(heads))]
    table = [
        "<table><tr><th class=l>all heads together<th>this file<th>adaptive default<th>dense</tr>",
        *(
            f"<tr><td class=l>time {name}<td>{a:.2f} s<td>{b:.2f} s<td>{c:.2f} s</tr>"
            for name, a, b, c in rows
        ),
    ]
    if check := result.check:
        s, e = check.seconds, check.error
        table += [
            f"<tr><td class=l>time measured, first prompt<td>{s['file']:.2f} s"
            f"<td>{s['adaptive']:.2f} s<td>{s['dense']:.2f} s</tr>",
            f"<tr><td class=l>output error measured, first prompt<td>{e['file']:.3%}"
            f"<td>{e['adaptive']:.3%}<td>{e['dense']:.3%}</tr>",
        ]
    lines += [*table, "</table>"]
    lines.append(
        '<p class="muted">Seconds of one CPU thread for prefill attention, planning included. '
        "The adaptive default is what a head without a file does, at a coverage of "
        f"{DEFAULT.coverage:.0%}. Measured errors are those of all heads' outputs together, "
        "against attention over every key.</p>"
    )
    return lines


def _modelled(heads: Sequence[Choice]) -> tuple[float, float, float]:
    chosen = sum(c.chosen.seconds for c in heads)
    default = sum(c.default.seconds for c in heads if c.default)
    dense = sum(next(b.seconds for b in c.best if b.pattern.kind == "dense") for c in heads)
    return chosen, default, dense


def _legend() -> str:
    items = [
        f'<li><span class=key style="background:{KIND_COLOURS[k]}"></span>{KIND_NAMES[k]}: '
        f"{MEANING[k]}"
        for k in ORDER
    ]
    return f"<ul class=legend>{''.join(items)}</ul>" + (
        '<p class="muted">In a cell is the budget: counts, or with % the share of attention mass '
        "that has to be covered. Density and time go from white (nothing) to full (dense), error "
        "from white (0.1%) to full (10%), on a logarithmic scale.</p>"
    )


def _map(layer: int, choices: Sequence[Choice]) -> str:
    rows: list[Row] = []
    patterns, densities, times, errors = [], [], [], []
    for head, choice in enumerate(choices):
        c = choice.chosen
        said = (
            f"head {head}: {c.label}, density {c.density:.1%}, error {c.error:.2%} "
            f"(last 64 rows {c.last:.2%}, worst {c.worst:.2%}), time {c.time:.1%} of dense"
        )
        if choice.default:
            d = choice.default
            said += f"; adaptive default: error {d.error:.2%}, time {d.time:.1%}"
        patterns.append(
            Cell(KIND_COLOURS[c.pattern.kind], budget(c.pattern).replace(" ", "") or "all", said)
        )
        densities.append(Cell(shade(c.density, BLUE), f"{c.density:.1%}", said))
        times.append(Cell(shade(c.time, GREEN), f"{c.time:.1%}", said))
        errors.append(Cell(shade(log_share(c.error, 1e-3, 0.1), RED), f"{c.error:.2%}", said))
    rows = [
        Row("pattern", patterns),
        Row("density", densities),
        Row("time", times),
        Row("error", errors),
    ]
    return heat_map(rows, f"Layer {layer}: pattern, density, time and error of each head")


def _layer_error(choices: Sequence[Choice]) -> str:
    """What the layer hands on: all its heads together, in the prompt where that is worst."""
    defaults = [c.default for c in choices if c.default]
    if len(defaults) < len(choices) or not all(c.chosen.shares for c in choices):
        return ""
    ours, theirs = (
        max(sum(shares) for shares in zip(*(c.shares for c in found), strict=True)) ** 0.5
        for found in ([c.chosen for c in choices], defaults)
    )
    seconds = sum(c.chosen.seconds for c in choices) / sum(d.seconds for d in defaults)
    return (
        f'<p class="muted">All heads together: error {ours:.2%}, {theirs:.2%} with the adaptive '
        f"default; {seconds:.0%} of its time by the cost model.</p>"
    )


def _details(choices: Sequence[Choice]) -> str:
    head = "".join(f"<th class=l>{KIND_NAMES[k]}" for k in ORDER[:-1])
    lines = [
        "<details><summary>What competed in each head</summary><div class=scroll><table>"
        f"<tr><th>head<th class=l>chosen{head}<th class=l>ties</tr>"
    ]
    for number, choice in enumerate(choices):
        best = {b.pattern.kind: i for i, b in enumerate(choice.best)}
        cells = []
        for kind in ORDER[:-1]:
            if kind not in best:
                cells.append("<td class=l>-")
                continue
            b = choice.best[best[kind]]
            style = "" if choice.within[best[kind]] else " out"
            cells.append(
                f'<td class="l{style}">{escape(budget(b.pattern))}<br>'
                f"{b.time:.1%}, {b.error:.2%} / {b.last:.2%} / {b.worst:.1%}"
            )
        ties = ", ".join(t.label for t in choice.tied[:4]) + (
            f" and {len(choice.tied) - 4} more" if len(choice.tied) > 4 else ""
        )
        lines.append(
            f"<tr><td>{number}<td class=l>{escape(choice.chosen.label)}{''.join(cells)}"
            f"<td class=l>{escape(ties) or '-'}</tr>"
        )
    lines.append(
        "</table></div>"
        "<p class=muted>Of each kind the cheapest that meets the goal, as time (share "
        "of dense), error / of the last 64 rows / of the worst 64; in red, where none meets it, "
        "the one with the least error.</p></details>"
    )
    return "".join(lines)


def _explanation(result: Result) -> list[str]:
    costs = result.costs
    plan = "".join(
        f"<tr><td class=l>planning, {escape(name)}<td>{fixed * 1e6:.0f} µs "
        f"<td class=l>a chunk, and {each * 1e9:.1f} ns for each token of context</tr>"
        for name, (fixed, each) in sorted(costs.plan.items())
    )
    return [
        "<h2>What a pattern costs</h2>",
        f"<p>Measured on this machine ({escape(costs.machine)}) with the kernels that serve, for "
        "this model's shape and type, in CPU seconds of one thread and one head. A pattern's time "
        "is the sum of these over everything it reads; so the kinds compete by what they really "
        "cost, planning included, and not by the number of keys.</p>",
        f"<table><tr><td class=l>each tile of 64 rows<td>{costs.tile * 1e6:.2f} µs<td></tr>"
        f"<tr><td class=l>each block of 64 keys that a tile reads<td>{costs.block * 1e6:.2f} µs"
        f"<td></tr><tr><td class=l>each single key that a tile reads<td>{costs.column * 1e6:.3f} µs"
        f"<td class=l>{64 * costs.column / max(costs.block, 1e-30):.2f} of a key in a block"
        f"</tr>{plan}</table>",
        "<h2>Ties</h2>",
        f"<p>Costs that differ by less than {TIE:.0%} are taken as equal: they are not measured "
        "more finely, and heads that share a KV head make each other cheaper by a little, which "
        "the model leaves out. Of patterns that tie, the one with the least error (to 0.1%) is "
        "taken; of those the one that is simplest to plan, in this order: "
        f"{', '.join(KIND_NAMES[k] for k in ORDER)}. Every selection holds the first block of 64 "
        "keys and the last two, whatever its kind; so a head that rests on the first token and on "
        "near ones ties in all kinds, and gets the A-shape, which is planned for nothing.</p>",
        "<h2>What an error is</h2>",
        "<p>The root of the summed squared differences between a head's output and that of dense "
        "attention, relative to the latter, over all rows of a prompt; the largest over the "
        "prompts. The last 64 rows, where a question stands, and the worst other 64 are bounded "
        "apart: they are a few rows of a long prompt, and over all rows an error in them would not "
        f"be seen. What takes {WORTH:.0%} of dense or more is not worth an error.</p>",
        *_by_layer(result),
    ]


def _by_layer(result: Result) -> list[str]:
    if not result.goal.by_layer:
        return []
    return [
        "<p>The heads of a layer share out what the adaptive default is wrong by in it: together "
        f"they may make {MARGIN:.0%} of its error in each prompt, and among the patterns that keep "
        "to that, the cheapest are taken. So a head that contributes little may be cruder than one "
        "that contributes much, and a head in which nothing beats the default keeps it.</p>"
    ]

"""The report of a search: complete, and safe with whatever a model or prompt is named."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from vllm_sparse.patterns import ModelInfo, PatternFile
from vllm_sparse.report.html import write_report
from vllm_sparse.report.svg import Cell, Row, heat_map, ink, log_share, shade
from vllm_sparse.search.candidates import DEFAULT, DENSE, candidates, plan_class
from vllm_sparse.search.choose import Candidate, Goal, choose
from vllm_sparse.search.cost import PLANNED, Costs
from vllm_sparse.search.prompts import Prompt
from vllm_sparse.search.run import Check, Result

EVIL = '<script>alert("x")</script>&<img src=http://evil onerror=x>'


def result(heads: int = 4, **changes) -> Result:
    found = []
    for i, p in enumerate(candidates(1024)):
        share = 1.0 if p == DENSE else 0.1 + i / 60
        error = 0.0 if p == DENSE else 0.001 * i
        found.append(Candidate(p, error, 2 * error, error, share, share, share, (error**2,)))
    (choice,) = choose([found], Goal(), DEFAULT)
    return Result(
        **{
            "file": PatternFile(
                model=ModelInfo(name=EVIL, layers=4, heads=heads, kv_heads=2, head_size=64),
                layers={0: {i: choice.chosen.pattern for i in range(heads)}},
            ),
            "choices": {0: [choice] * heads, 2: [choice] * heads},
            "windows": {1: 512},
            "prompts": [Prompt(EVIL, [1, 2, 3])],
            "costs": Costs(
                machine=EVIL, tile=1e-6, block=2e-5, column=4e-7,
                plan={plan_class(p): (1e-4, 1e-7) for p in PLANNED},
            ),
            "goal": Goal(),
            "seconds": 90.0,
            "check": Check(
                3,
                {"file": 1.0, "adaptive": 1.25, "dense": 8.0},
                {"file": 0.01, "adaptive": 0.02, "dense": 1e-6},
            ),
            **changes,
        }
    )  # fmt: skip


def test_names_are_shown_and_not_obeyed(tmp_path: Path):
    path = tmp_path / "report.html"
    write_report(result(), path)
    text = path.read_text()
    assert "<script" not in text and "<img" not in text
    assert text.count("&lt;script&gt;") >= 3
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)  # well-formed


def test_it_says_what_was_found(tmp_path: Path):
    path = tmp_path / "report.html"
    write_report(result(), path)
    text = path.read_text()
    assert "last 512 tokens only" in text and "Was not seen" in text
    assert "1.25 s" in text and "2.000%" in text
    assert text.count("All heads together: error") == 2
    assert text.count("<svg") == 2 and text.count("<details") == 2
    without = result(check=None, choices={}, windows={})
    write_report(without, path)
    assert "No layer of this model" in path.read_text()


def test_many_heads_fit():
    cells = [Cell("#ffffff", "64+64", f"head {i}") for i in range(128)]
    wide = heat_map([Row("pattern", cells)], "t")
    narrow = heat_map([Row("pattern", cells[:8])], "t")
    assert wide.count("<rect") == 128 and "64+64" not in wide
    assert narrow.count("64+64") == 8


def test_colours_can_be_read():
    assert shade(0, (33, 86, 138)) == "#fafafa" and shade(1, (33, 86, 138)) == "#21568a"
    assert shade(-1, (0, 0, 0)) == "#fafafa" and shade(9, (0, 0, 0)) == "#000000"
    assert ink("#fafafa") == "#1c2126" and ink("#21568a") == "#ffffff"
    assert log_share(1e-4, 1e-3, 0.1) == 0 and log_share(1.0, 1e-3, 0.1) == 1
    assert abs(log_share(0.01, 1e-3, 0.1) - 0.5) < 1e-9

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from motionrft.core.errors import ConfigError, DataError
from motionrft.report import charts, search_charts
from motionrft.report.clips import ClipView, pack_joints, unpack_joints
from motionrft.report.html import render_report, write_report
from motionrft.report.markup import esc, json_script

EVIL = '</script><img src=x onerror="alert(1)">&\u2028'
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests look for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data_blocks: list[str] = []
        self._in_data = False
        self.feed(text)
        self.close()
        assert self.open == [], f"unclosed tags {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("type") == "application/json"
        if self._in_data:
            self.data_blocks.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"
        self._in_data = False

    def handle_data(self, data):
        if self._in_data:
            self.data_blocks[-1] += data
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def cells(scale: float = 1.0, method: str = "student_t", **values: float) -> dict:
    base = {
        "r_precision_top1": 0.5, "r_precision_top3": 0.75, "fid": 48.0, "mm_dist": 0.95, "diversity": 1.2,
        "jerk": 240.0, "foot_slide": 1.1, "foot_skate_ratio": 0.57, "bone_drift": 0.0135, "reward_total": 0.6,
    }  # fmt: skip
    merged = {k: scale * v for k, v in base.items()} | values
    return {k: {"mean": v, "ci95": 0.01 * abs(v), "n": 3, "method": method} for k, v in merged.items()}


GOOD = cells(r_precision_top1=0.7, fid=35.0, jerk=185.0, foot_slide=0.8)
ROUGH = cells(r_precision_top1=0.7, fid=35.0, jerk=410.0, foot_slide=0.8)


def summary(after: dict = GOOD, **extra) -> dict:
    rows = [
        {"key": "real", "label": "Real", "metrics": cells(0.5, "bootstrap", r_precision_top1=0.995)},
        {"key": "before", "label": "Base", "metrics": cells()},
        {"key": "after", "label": "EasyTune", "metrics": after},
        {"key": "before", "label": "Base", "metrics": cells(), "evaluator": "B"},
    ]
    gate = {"name": "real_top1", "passed": True, "required": True, "text": "R@1 0.99"}
    return {
        "title": "Demo",
        "rows": rows,
        "fid_floor": {"A": 4.3},
        "gates": [{"name": "A", "accepted": True, "gates": [gate]}],
        "timings": {"reward": 33.0, "tune": 200.0},
        "fingerprints": {"config": "abc123"},
    } | extra


CURVES = {
    "fine-tuning": [
        {
            "step": i,
            "loss/total": -0.1 * i,
            "reward/semantic/raw": 0.1 * i,
            "reward/semantic/weighted": 0.1 * i,
            "reward/total": 0.1 * i,
            "optim/grad_norm": float("nan") if i == 2 else 1.0,
            "memory/peak_gib": 1.0,
        }
        for i in range(1, 6)
    ],
    "tune": [{"trial": f"t{i}", "lr": 10.0**-i, "kind": "ab"[i % 2], "objective": 0.1 * i} for i in range(1, 5)],
}


def joints(frames: int = 12) -> np.ndarray:
    return np.random.default_rng(0).uniform(-3, 3, (frames, 22, 3))


def clip(prompt: str = "a person walks") -> ClipView:
    return ClipView(prompt, [("before", joints(), 20.0), ("after", joints(9), 20.0)])


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_report(summary(), CURVES, [clip()], "lr: 3e-5", ["chosen on val"]))


def test_the_page_is_balanced_html_with_every_section(page: Page):
    headings = {attrs.get("id") for tag, attrs in page.tags if tag == "h2"}
    assert headings == {"result", "watch", "rows", "curves", "gates", "read", "origin"}
    for text in ("0.500", "0.700", "Judged by evaluator B", "lr: 3e-5", "chosen on val", "abc123", "3 min 53 s", "4.3"):
        assert text in page.text, text


def test_ids_are_unique_and_links_lead_somewhere(page: Page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        if tag == "a":
            assert attrs["href"][1:] in ids


def test_the_page_asks_nothing_of_the_network(page: Page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img"), tag
        assert "src" not in attrs, attrs
        assert not (attrs.get("href") or "#").startswith(("http", "//"))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_plotly_is_inlined_once_and_only_with_charts():
    marker = re.compile(r"plotly\.js v\d")
    with_charts = render_report(summary(), CURVES, [])
    assert len(marker.findall(with_charts)) == 1
    assert not marker.findall(render_report(summary(), {}, []))


def test_every_text_is_escaped_everywhere():
    evil_rows = summary()["rows"]
    for row in evil_rows:
        row["label"] = row["note"] = EVIL
        row["evaluator"] = EVIL
    data = summary(
        title=EVIL,
        subtitle=EVIL,
        rows=evil_rows,
        gates=[{"name": EVIL, "accepted": False, "gates": [{"name": EVIL, "passed": False, "text": EVIL}]}],
        timings={EVIL: 1.0},
        fingerprints={EVIL: EVIL},
        limits=[EVIL],
        headline=EVIL,
    )
    curves = {EVIL: [{"step": 1, f"loss/{EVIL}": 1.0}], "tune": [{EVIL: EVIL, "objective": 1.0}, {EVIL: "b"}]}
    view = ClipView(EVIL, [(EVIL, joints(), 20.0)])
    text = render_report(data, curves, [view], EVIL, [EVIL])
    assert EVIL not in text
    page = Page(text)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "<img src=x" in page.text


def test_player_data_round_trips_within_half_a_millimetre(page: Page):
    block = next(json.loads(b) for b in page.data_blocks if "panels" in json.loads(b))
    titles = [(p["title"], p["role"], p["frames"], p["fps"]) for p in block["panels"]]
    assert titles == [("before", "before", 12, 20.0), ("after", "after", 9, 20.0)]
    assert np.abs(unpack_joints(block["panels"][0]["joints"]) - joints()).max() <= 0.0005 + 1e-9


def test_far_joints_stick_to_the_limit_instead_of_wrapping():
    far = np.full((1, 22, 3), 50.0)
    assert unpack_joints(pack_joints(far)).min() == pytest.approx(32.767)
    assert unpack_joints(pack_joints(-far)).max() == pytest.approx(-32.767)


def test_a_gain_without_harm_is_said_in_the_headline(page: Page):
    heading = render_report(summary(), {}, []).split("<h1>")[1].split("</h1>")[0]
    assert "0.500 → 0.700" in heading
    assert "without getting rougher" in heading
    assert "6 of 6 targets met" in page.text


def test_a_price_is_said_in_the_headline_and_the_table():
    text = render_report(summary(ROUGH), {}, [])
    heading = text.split("<h1>")[1].split("</h1>")[0]
    assert "at a price: jerk +71%" in heading
    assert "5 of 6 targets met" in text
    assert text.count("✗ missed") == 2  # card and table


def test_no_gain_is_not_called_one():
    text = render_report(summary(cells(r_precision_top1=0.505)), {}, [])
    assert "No clear gain" in text.split("<h1>")[1].split("</h1>")[0]


def test_missing_numbers_show_as_dashes_and_are_not_judged():
    after = cells(r_precision_top1=0.7)
    after["jerk"] = {"mean": None, "ci95": None, "n": 0, "method": "none"}
    after["fid"]["mean"] = math.nan
    text = render_report(summary(after), {}, [])
    Page(text)
    assert "not measured" in text
    assert "4 of 4 targets met" in text
    assert ">nan" not in text.lower()


def test_an_empty_summary_still_makes_a_page():
    page = Page(render_report({}, {}, []))
    assert "No before/after comparison" in page.text


def test_a_bootstrap_interval_carries_a_dagger(page: Page):
    assert "†" in page.text


def test_without_plotly_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ("plotly", "plotly.offline", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"motionrft\[viz\]"):
        charts.plotly_js()
    text = render_report(summary(), CURVES, [clip()])
    Page(text)
    assert "No charts" in text
    assert "motionrft[viz]" in text


def test_charts_cover_rewards_losses_gradients_memory_and_trials():
    titles = [c.title for c in charts.build_charts(CURVES)]
    assert [t.split(": ", 1)[1] for t in titles] == [
        "reward terms, raw", "reward terms, weighted", "loss", "gradient norm", "memory", "what the search tried",
    ]  # fmt: skip


def test_gradient_norms_by_denoising_step_become_a_heat_map():
    rows = [{"step": i, **{f"optim/grad_norm_by_step/{k:02d}": i * k for k in range(3)}} for i in range(4)]
    (chart,) = charts.build_charts({"ft": rows})
    assert chart.figure["data"][0]["type"] == "heatmap"
    assert chart.figure["data"][0]["z"][2] == [0.0, 2.0, 4.0, 6.0]


def test_lines_over_numbers_have_bands_or_whiskers_and_share_a_stage_with_bars():
    look = {"x_title": "denoising step", "y_title": "norm", "log": True, "caption": "What is left."}
    lines = [
        {"chart": "flow", "series": name, "x": i, "value": 10.0**-i, "low": 0.1**i / 2, "high": 0.1**i * 2, **look}
        for name in ("step", "chain")
        for i in range(3)
    ]
    points = [
        {"chart": "memory", "series": "easytune", "x": n, "value": 3.0, "high": 4.0, "markers": 1} for n in (5, 9)
    ]
    bars = [{"chart": "bars", "series": "a", "group": "g", "value": 2.0, "low": 1.5, "high": 2.25}]
    flow, memory, bar = charts.build_charts({"compare": [*lines, *points, *bars]})
    assert [t["name"] for t in flow.figure["data"] if t.get("showlegend", True)] == ["step", "chain"]
    assert flow.figure["data"][0]["y"] == [0.5, 0.05, 0.1**2 / 2] and flow.figure["data"][1]["fill"] == "tonexty"
    assert flow.figure["layout"]["yaxis"]["type"] == "log" and flow.caption == "What is left."
    assert flow.figure["layout"]["xaxis"]["title"]["text"] == "denoising step"
    (line,) = memory.figure["data"]
    assert line["mode"] == "lines+markers" and line["x"] == [5.0, 9.0]
    assert line["error_y"]["array"] == [1.0, 1.0] and line["error_y"]["arrayminus"] == [0, 0]
    assert bar.figure["data"][0]["error_y"]["array"] == [0.25] and bar.figure["data"][0]["type"] == "bar"
    gap = charts.series_lines("t", [{"series": "a", "x": i, "value": v} for i, v in enumerate((1.0, math.nan))])
    assert gap.figure["data"][0]["y"] == [1.0, None]


def test_missing_values_leave_gaps_in_lines():
    norm = next(c for c in charts.build_charts(CURVES) if "gradient" in c.title)
    assert norm.figure["data"][0]["y"] == [1.0, None, 1.0, 1.0, 1.0]


def test_trials_are_scaled_to_their_axes():
    chart = search_charts.parallel_coordinates(CURVES["tune"])
    assert [round(line["y"][0], 3) for line in chart.figure["data"]] == [1.0, 0.667, 0.333, 0.0]
    assert next(line["y"][-1] for line in chart.figure["data"]) == 0.0


def test_writing_is_atomic_and_creates_folders(tmp_path: Path):
    path = write_report(tmp_path / "a" / "report.html", summary(), {}, [clip()])
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_undrawable_motion_is_refused_with_its_name():
    broken = joints()
    broken[3, 2, 1] = np.nan
    for bad in (broken, joints().reshape(12, 66), np.zeros((0, 22, 3))):
        with pytest.raises(DataError, match="panel 'after'"):
            ClipView("walk", [("after", bad, 20.0)])
    with pytest.raises(DataError, match="no motion"):
        ClipView("walk", [])


def test_data_blocks_cannot_be_ended_by_their_content():
    block = json_script({"x": EVIL, "nan": math.nan})
    assert block.count("</script>") == 1
    assert json.loads(block.split(">", 1)[1].rsplit("<", 1)[0]) == {"x": EVIL, "nan": None}
    assert esc("<\"&'>") == "&lt;&quot;&amp;&#x27;&gt;"

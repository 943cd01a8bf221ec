"""HTML of one player: panels side by side, one clock, one camera. `assets/player.js` brings it to life."""

from __future__ import annotations

from motionrft.report.clips import ClipView, pack_joints
from motionrft.report.markup import esc, json_script
from motionrft.representations.skeleton import T2M

SPEEDS = (0.25, 0.5, 1.0, 2.0)
CONTACT_HEIGHT_M = 0.07
SLIDE_SPEED_M_S = 0.5


def skeleton_data() -> str:
    """Return the data block that every player of a page shares."""
    sides = [name.split("_")[0] if name.startswith(("left", "right")) else "middle" for name in T2M.joint_names]
    toes = [T2M.joint_names.index(name) for name in ("left_foot", "right_foot")]
    return json_script(
        {
            "parents": list(T2M.parents),
            "sides": sides,
            "toes": toes,
            "head": T2M.joint_names.index("head"),
            "contactHeight": CONTACT_HEIGHT_M,
            "slideSpeed": SLIDE_SPEED_M_S,
        },
        "player-skeleton",
    )


def player_html(clip: ClipView, index: int) -> str:
    """Return one player as a figure; `index` makes its ids unique in the page."""
    panels = "".join(
        f'<div class="panel role-{esc(role_of(panel.title))}"><div class="panel-title">{esc(panel.title)}</div>'
        f'<canvas tabindex="0" role="img" aria-label="{esc(panel.title)}: {esc(clip.prompt)}. '
        'Arrow keys turn the camera, plus and minus zoom, space plays."></canvas></div>'
        for panel in clip.panels
    )
    data = {
        "panels": [
            {
                "title": panel.title,
                "role": role_of(panel.title),
                "fps": panel.fps,
                "frames": len(panel.joints_TJ3),
                "joints": pack_joints(panel.joints_TJ3),
            }
            for panel in clip.panels
        ]
    }
    speeds = "".join(
        f'<option value="{speed:g}"{" selected" if speed == 1.0 else ""}>{speed:g}×</option>' for speed in SPEEDS
    )
    return (
        f'<figure class="player" id="player-{index}"><figcaption><q>{esc(clip.prompt)}</q></figcaption>'
        f'<div class="panels" style="--panels:{len(clip.panels)}">{panels}</div>'
        '<div class="controls" role="group" aria-label="playback">'
        '<button type="button" class="play" aria-pressed="false">Play</button>'
        '<input type="range" class="scrub" min="0" max="1000" value="0" step="1" aria-label="time">'
        '<output class="clock">0.0 s</output>'
        f'<label>speed <select class="speed">{speeds}</select></label>'
        '<label><input type="checkbox" class="follow" checked> follow</label>'
        '<button type="button" class="reset">Reset view</button></div>'
        f"{json_script(data, css_class='player-data')}</figure>"
    )


def role_of(title: str) -> str:
    """Return the colour role of a panel or row: real, before, after, or other."""
    words = title.lower().replace("_", " ")
    for role, names in (
        ("real", ("real", "ground truth", "recorded")),
        ("after", ("after", "tuned", "easytune")),
        ("before", ("before", "base")),
    ):
        if any(name in words for name in names):
            return role
    return "other"

"""Draw the four tensor modes and a packed batch for the docs, as SVG.

    python tools/concept_pictures.py

Writes docs/images/mode-mtp.svg, mode-msp.svg, mode-fsp.svg, mode-isp.svg and packing.svg, and beside each X.svg its
Chinese X.zh.svg, which the site takes for Chinese pages.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from evomesh.data.packing.packs import Pack, PackRule, assemble  # noqa: E402

IMAGES = ROOT / "docs" / "images"
# The card has its own ground, so that a page in the other scheme does no harm.
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans SC", "PingFang SC", sans-serif }
.card { fill: #ffffff; stroke: #d5d9e2 }
text { fill: #1f2430 }
.small { font-size: 12px }
.title { font-size: 16px; font-weight: 600 }
.quiet { fill: #5a6375 }
.line { stroke: #5a6375; stroke-width: 1.5; fill: none }
.missing { fill: none; stroke: #9aa3b5; stroke-dasharray: 3 3 }
.values { fill: #7fb2f0; stroke: #2f6fbf }
.weight { fill: #f2c14e; stroke: #a87408 }
.gathered { fill: #fbecc4; stroke: #a87408; stroke-dasharray: 2 2 }
.bar { fill: #b23a6b }
.on-bar { fill: #ffffff; font-weight: 600 }
.back { fill: #b23a6b; font-weight: 600 }
.kept { fill: #1f2430; stroke: #ffffff }
.first { fill: #7fb2f0 } .second { fill: #f2c14e } .third { fill: #8ccf9b } .fourth { fill: #d8a6e8 }
.masked { fill: #eef0f4 }
.cell { stroke: #ffffff; stroke-width: 1 }
.on-cell { fill: #1f2430; font-size: 12px }
@media (prefers-color-scheme: dark) {
  .card { fill: #1e212a; stroke: #3a4050 }
  text { fill: #e6e9f0 }
  .quiet { fill: #a4adbf }
  .line { stroke: #a4adbf }
  .missing { stroke: #6b7488 }
  .gathered { fill: #57491f; stroke: #f2c14e }
  .back { fill: #f08bb4 }
  .masked { fill: #2b303c }
  .cell { stroke: #1e212a }
  .on-bar { fill: #ffffff }
  .on-cell { fill: #1f2430 }
}
"""
CHINESE = {
    "residual stream between blocks: whole on each rank": "块之间的残差流：每个进程都有完整的一份",
    "residual stream between blocks: a part of the tokens on each rank": "块之间的残差流：每个进程有一部分 token",
    "rank 0": "进程 0",
    "rank 1": "进程 1",
    "backward": "反向",
    "activations (down: tokens, across: features)": "激活（纵向：token，横向：特征）",
    "weights": "权重",
    "on another rank": "在别的进程上",
    "kept for backward": "为反向保留",
    "gathered for the block": "为这个块聚集",
    "weights of the block: all-gather over wp": "块的权重：在 wp 上 all-gather",
    "weights: all-gather over wp, reduce-scatter of their gradients": "权重：在 wp 上 all-gather，梯度 reduce-scatter",
    "documents": "文档",
    "position": "位置",
    "target": "目标",
    "attention": "注意力",
    "each row: what the token on its left sees": "每一行：左边的 token 能看到什么",
}


@dataclass
class Drawing:
    """A picture in the making.

    Attributes:
        words: the translation of each text; others stay as they are.
        lines: elements so far.
    """

    words: dict[str, str]
    lines: list[str]

    def box(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        self.lines.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
        )

    def write(
        self, text: str, x: float, y: float, kind: str = "", anchor: str = "middle"
    ) -> None:
        shown = escape(self.words.get(text, text))
        self.lines.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{shown}</text>'
        )

    def write_up(self, text: str, x: float, y: float, kind: str) -> None:
        """Write from below to above, around a center."""
        self.lines.append(
            f'<text class="{kind}" text-anchor="middle" transform="translate({x:g} {y:g}) rotate(-90)">'
            f"{escape(text)}</text>"
        )

    def arrow(self, x: float, y: float, to_x: float) -> None:
        """Draw a horizontal arrow."""
        back = 5 if to_x < x else -5
        self.lines.append(
            f'<path class="line" d="M{x:g} {y:g}H{to_x:g}m{back} -4l{-back} 4l{back} 4"/>'
        )

    def path(self, path: str) -> None:
        self.lines.append(f'<path class="line" d="{path}"/>')

    def dot_on_line(self, x: float, y: float) -> None:
        self.lines.append(f'<circle class="bar" cx="{x:g}" cy="{y:g}" r="5"/>')

    def dot(self, x: float, y: float) -> None:
        self.lines.append(f'<circle class="kept" cx="{x:g}" cy="{y:g}" r="4"/>')

    def svg(self, width: float, height: float, title: str) -> str:
        card = f'<rect class="card" x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
                f"<title>{escape(title)}</title>",
                f"<style>{STYLE}</style>",
                card,
                *self.lines,
                "</svg>\n",
            ]
        )


@dataclass(frozen=True)
class Part:
    """A tensor of a block on two ranks, or the place of a collective.

    Attributes:
        name: above it.
        kind: "values", "weight" or "collective".
        split: "whole", "tokens" (or a weight's rows: above and below) or "features" (left and right).
        kept: it is kept for backward.
        gathered: other ranks' parts are there while the block computes.
        backward: collectives of backward in this place, in their order.
    """

    name: str
    kind: str
    split: str = "whole"
    kept: bool = False
    gathered: bool = False
    backward: tuple[str, ...] = ()


def collective(name: str, *backward: str) -> Part:
    return Part(name, "collective", backward=backward)


def values(name: str, split: str, kept: bool) -> Part:
    return Part(name, "values", split, kept)


def weight(name: str, split: str, gathered: bool = False) -> Part:
    return Part(name, "weight", split, gathered=gathered)


def tensor_parallel_block(
    stream: str, entry: Part, exit_: Part, *, keeps_inputs: bool
) -> list[Part]:
    """Return a block of mtp, msp or fsp: columns of one weight, then rows of the next."""
    return [
        values("x", stream, kept=True),
        entry,
        values("norm(x)", "whole", keeps_inputs),
        weight("Wqkv", "features"),
        values("q k v", "features", kept=True),
        values("heads", "features", kept=True),
        weight("Wo", "tokens"),
        exit_,
        values("x + attn", stream, kept=True),
        entry,
        values("norm(x)", "whole", keeps_inputs),
        weight("W1 W3", "features"),
        values("h", "features", kept=True),
        weight("W2", "tokens"),
        exit_,
        values("x + ffn", stream, kept=False),
    ]


def sequence_parallel_block() -> list[Part]:
    """Return a block of isp: whole weights while it computes, attention on part of the heads."""
    exchange = collective("all-to-all", "all-to-all")
    return [
        values("x", "tokens", kept=True),
        values("norm(x)", "tokens", kept=True),
        weight("Wqkv", "features", gathered=True),
        values("q k v", "tokens", kept=False),
        exchange,
        values("q k v", "features", kept=True),
        values("heads", "features", kept=True),
        exchange,
        values("heads", "tokens", kept=True),
        weight("Wo", "features", gathered=True),
        values("x + attn", "tokens", kept=True),
        values("norm(x)", "tokens", kept=True),
        weight("W1 W3", "features", gathered=True),
        values("h", "tokens", kept=True),
        weight("W2", "features", gathered=True),
        values("x + ffn", "tokens", kept=False),
    ]


def blocks() -> dict[str, list[Part]]:
    """Return the parts of a block by mode."""
    gather = collective("all-gather", "reduce-scatter")
    scatter = collective("reduce-scatter", "all-gather")
    again = collective("all-gather", "all-gather", "reduce-scatter")
    none = collective("", "all-reduce")
    reduce = collective("all-reduce")
    return {
        "mtp": tensor_parallel_block("whole", none, reduce, keeps_inputs=True),
        "msp": tensor_parallel_block("tokens", gather, scatter, keeps_inputs=True),
        "fsp": tensor_parallel_block("tokens", again, scatter, keeps_inputs=False),
        "isp": sequence_parallel_block(),
    }


PART_WIDTH, PART_HEIGHT, GAP, BAR = 44, 58, 13, 22
LEFT, NAMES, FIRST_RANK, RANK_STEP = 84, 66, 78, 78
RANKS_END = FIRST_RANK + RANK_STEP + PART_HEIGHT


class ModePicture:
    """The picture of one mode."""

    def __init__(self, mode: str, words: dict[str, str]) -> None:
        self.mode = mode
        self.parts = blocks()[mode]
        self.out = Drawing(words, [])
        self.places: list[float] = []
        place = float(LEFT)
        for part in self.parts:
            self.places.append(place)
            place += self._width(part) + GAP
        self.width = place - GAP + 20

    @staticmethod
    def _width(part: Part) -> int:
        return BAR if part.kind == "collective" else PART_WIDTH

    @property
    def is_gathered(self) -> bool:
        return any(part.gathered for part in self.parts)

    def draw(self) -> str:
        """Return the SVG."""
        for rank in (0, 1):
            middle = FIRST_RANK + rank * RANK_STEP + PART_HEIGHT / 2
            self.out.write(f"rank {rank}", 12, middle + 4, "quiet", "start")
        for place, part in zip(self.places, self.parts, strict=True):
            if part.kind == "collective":
                self._draw_collective(place, part)
            else:
                self._draw_tensor(place, part)
        self._draw_arrows()
        self._draw_head()
        end = self._draw_backward()
        return self.out.svg(self.width, self._draw_legend(end), self.mode)

    def _draw_head(self) -> None:
        stream = self.parts[0].split
        place = (
            "whole on each rank"
            if stream == "whole"
            else "a part of the tokens on each rank"
        )
        self.out.write(self.mode, 12, 26, "title", "start")
        text = f"residual stream between blocks: {place}"
        self.out.write(text, LEFT, 26, "quiet", "start")
        if self.is_gathered:
            self._draw_weight_gather()

    def _draw_weight_gather(self) -> None:
        """Draw the gather of the block's weights: a line with a branch to each of them."""
        centers = [
            place + PART_WIDTH / 2
            for place, part in zip(self.places, self.parts, strict=True)
            if part.gathered
        ]
        text = "weights of the block: all-gather over wp"
        self.out.write(text, self.width - 20, 26, "back", "end")
        self.out.path(f"M{centers[0]:g} 40H{centers[-1]:g}")
        for center in centers:
            self.out.path(f"M{center:g} 40v10m-4 -5l4 5l4 -5")

    def _draw_tensor(self, place: float, part: Part) -> None:
        self.out.write(part.name, place + PART_WIDTH / 2, NAMES, "small")
        for rank in (0, 1):
            top = FIRST_RANK + rank * RANK_STEP
            missing = "gathered" if part.gathered else "missing"
            self.out.box(missing, place, top, PART_WIDTH, PART_HEIGHT)
            width, height = PART_WIDTH, PART_HEIGHT
            left = place
            if part.split == "tokens":
                height //= 2
                top += rank * height
            elif part.split == "features":
                width //= 2
                left += rank * width
            self.out.box(part.kind, left, top, width, height)
            if part.kept:
                self.out.dot(left + width / 2, top + height / 2)

    def _draw_collective(self, place: float, part: Part) -> None:
        if not part.name:
            return
        top = FIRST_RANK - 6
        height = RANKS_END - top + 6
        self.out.box("bar", place, top, BAR, height)
        middle = top + height / 2
        self.out.write_up(part.name, place + BAR / 2 + 4, middle, "on-bar")

    def _draw_arrows(self) -> None:
        """Draw an arrow from each part to the next, over the place of a collective that forward has not."""
        ends: list[float] = []
        starts: list[float] = []
        for place, part in zip(self.places, self.parts, strict=True):
            if part.name:
                starts.append(place)
                ends.append(place + self._width(part))
        for end, start in zip(ends, starts[1:], strict=False):
            for rank in (0, 1):
                middle = FIRST_RANK + rank * RANK_STEP + PART_HEIGHT / 2
                self.out.arrow(end + 2, middle, start - 2)

    def _draw_backward(self) -> float:
        """Draw the collectives of backward below their places, and return where they end."""
        top = RANKS_END + 34
        self.out.write("backward", 12, top + 4, "quiet", "start")
        right = self.places[-1] + PART_WIDTH
        self.out.arrow(right, top, LEFT)
        lines = 1
        for place, part in zip(self.places, self.parts, strict=True):
            for line, name in enumerate(part.backward):
                lines = max(lines, line + 1)
                y = top + 19 + 16 * line
                self.out.write(name, place + BAR / 2, y, "back small")
            if part.backward:
                self.out.dot_on_line(place + BAR / 2, top)
        end = top + 19 + 16 * (lines - 1)
        if self.is_gathered:
            end += 18
            text = "weights: all-gather over wp, reduce-scatter of their gradients"
            self.out.write(text, (LEFT + right) / 2, end, "back small")
        return end

    def _draw_legend(self, end: float) -> float:
        """Draw what the colors mean, and return the height of the picture."""
        y = end + 24
        entries = [
            ("values", "activations (down: tokens, across: features)"),
            ("weight", "weights"),
            ("missing", "on another rank"),
        ]
        if self.is_gathered:
            entries.append(("gathered", "gathered for the block"))
        x = float(LEFT)
        for kind, text in entries:
            self.out.box(kind, x, y - 2, 16, 12)
            self.out.write(text, x + 22, y + 9, "small", "start")
            x += 46 + shown_width(self.out.words.get(text, text))
        self.out.dot(x + 4, y + 4)
        self.out.write("kept for backward", x + 14, y + 9, "small", "start")
        return y + 28


def shown_width(text: str) -> float:
    """Return about how wide a text of 12 px is."""
    return sum(12.0 if ord(letter) > 0x2E7F else 6.1 for letter in text)


DOCUMENTS = {"A": 5, "B": 3, "C": 7, "D": 5}
KINDS = ("first", "second", "third", "fourth")
PACK_TOKENS = 10
CELL, PACK_LEFT, PACK_GAP = 26, 120, 64
STREAM_TOP, TOKENS_TOP = 18, 84
MATRIX_TOP = TOKENS_TOP + 4 * CELL


def packs() -> list[Pack]:
    """Return the packs of the picture, as training makes them; token n of the stream is n + 1."""
    stream = np.arange(1, sum(DOCUMENTS.values()) + 1)
    ends = np.cumsum(list(DOCUMENTS.values()))
    rule = PackRule(PACK_TOKENS, seq_len=PACK_TOKENS)
    found = []
    for start in range(0, len(stream), PACK_TOKENS):
        later = ends > start
        types = np.flatnonzero(later)
        found.append(assemble(stream[start:], ends[later] - start, types, rule))
    return found


def token_names() -> dict[int, str]:
    """Return the name of each token: its document and its number in it."""
    names = [
        f"{document}{number + 1}"
        for document, length in DOCUMENTS.items()
        for number in range(length)
    ]
    return {token + 1: name for token, name in enumerate(names)}


class PackingPicture:
    """The picture of documents in packs: positions, targets, and what attention sees."""

    def __init__(self, words: dict[str, str]) -> None:
        self.out = Drawing(words, [])
        self.names = token_names()
        self.packs = packs()
        self.pack_width = PACK_TOKENS * CELL
        rest = (len(self.packs) - 1) * (self.pack_width + PACK_GAP)
        self.right = PACK_LEFT + self.pack_width + rest

    def draw(self) -> str:
        """Return the SVG."""
        self._draw_documents()
        for label, row in (("position", 1), ("target", 2)):
            y = TOKENS_TOP + row * CELL + 18
            self.out.write(label, 12, y, "quiet", "start")
        self.out.write("attention", 12, MATRIX_TOP + 18, "quiet", "start")
        for number, pack in enumerate(self.packs):
            left = PACK_LEFT + number * (self.pack_width + PACK_GAP)
            self._draw_pack(left, number, pack)
        end = MATRIX_TOP + self.pack_width
        text = "each row: what the token on its left sees"
        self.out.write(text, PACK_LEFT, end + 22, "quiet small", "start")
        return self.out.svg(self.right + 20, end + 38, "packing")

    def _draw_documents(self) -> None:
        self.out.write("documents", 12, STREAM_TOP + 18, "quiet", "start")
        left = float(PACK_LEFT)
        # As wide as the packs below, so that each document is about above its tokens.
        scale = (self.right - PACK_LEFT - 3 * 6) / sum(DOCUMENTS.values())
        for kind, (name, length) in zip(KINDS, DOCUMENTS.items(), strict=True):
            width = length * scale
            self.out.box(kind, left, STREAM_TOP, width, CELL)
            self.out.write(name, left + width / 2, STREAM_TOP + 18, "on-cell")
            left += width + 6

    def _draw_pack(self, left: float, number: int, pack: Pack) -> None:
        middle = left + self.pack_width / 2
        self.out.write(f"pack {number}", middle, TOKENS_TOP - 10, "small")
        for column in range(PACK_TOKENS):
            x = left + column * CELL
            token = int(pack.tokens[column])
            target = self.names.get(int(pack.labels[column]), "–")
            position = int(pack.position_ids[column])
            kind = KINDS[pack.type_ids[column]]
            self.out.box(f"cell {kind}", x, TOKENS_TOP, CELL, CELL)
            center = x + CELL / 2
            self.out.write(self.names[token], center, TOKENS_TOP + 18, "on-cell")
            self.out.write(str(position), center, TOKENS_TOP + CELL + 18, "small")
            self.out.write(target, center, TOKENS_TOP + 2 * CELL + 18, "small")
            self._draw_matrix_row(left, column, pack)

    def _draw_matrix_row(self, left: float, row: int, pack: Pack) -> None:
        y = MATRIX_TOP + row * CELL
        first_seen = row - int(pack.position_ids[row])
        name = self.names[int(pack.tokens[row])]
        self.out.write(name, left - 8, y + 18, "small", "end")
        for column in range(PACK_TOKENS):
            kind = "masked"
            if first_seen <= column <= row:
                kind = KINDS[pack.type_ids[row]]
            self.out.box(f"cell {kind}", left + column * CELL, y, CELL, CELL)


def pictures() -> dict[str, str]:
    """Return each file's name and content."""
    found = {}
    for suffix, words in ((".svg", {}), (".zh.svg", CHINESE)):
        for mode in blocks():
            found[f"mode-{mode}{suffix}"] = ModePicture(mode, words).draw()
        found[f"packing{suffix}"] = PackingPicture(words).draw()
    return found


def main() -> None:
    """Write all pictures."""
    for name, content in pictures().items():
        (IMAGES / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()

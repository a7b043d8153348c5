"""Draw the book's logo and favicon: gradients that shrink from layer to layer, and the weights that are pruned, hollow.

`python book/draw_logo.py` writes them to book/_static. The heights follow 0.72^l, the decay of a tanh layer's gradient.
"""

from pathlib import Path

STATIC = Path(__file__).resolve().parent / "_static"
KEPT, PRUNED = "#0077bb", "#cc5500"
PRUNED_BARS = {2, 5}


def bars(count: int, size: float, *, shrink: float = 0.72) -> str:
    """Return `count` bars in a square of `size`, each `shrink` times as high as the one before it."""
    pitch = size / count
    width = 0.68 * pitch
    parts = []
    for index in range(count):
        height = max(size * 0.94 * shrink**index, width)
        x, y = index * pitch + (pitch - width) / 2, size * 0.97 - height
        box = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" rx="{width / 4:.2f}"'
        if index in PRUNED_BARS:
            line = width / 5
            parts.append(f'<rect {box} fill="none" stroke="{PRUNED}" stroke-width="{line:.2f}"/>')
        else:
            parts.append(f'<rect {box} fill="{KEPT}"/>')
    return "\n".join(parts)


def favicon() -> str:
    """Return the icon: four bars, which is what 16 pixels can show."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">\n{bars(4, 64)}\n</svg>\n'


def logo() -> str:
    """Return the logo: the bars and the name."""
    fits = 'textLength="188" lengthAdjust="spacingAndGlyphs"'  # whatever font the reader's machine has
    font = 'font-family="sans-serif" font-size="36" font-weight="600"'
    name = f'<text x="70" y="54" {font} {fits} fill="{KEPT}">gradprune</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 262 64">\n{bars(6, 62)}\n{name}\n</svg>\n'


if __name__ == "__main__":
    (STATIC / "favicon.svg").write_text(favicon())
    (STATIC / "logo.svg").write_text(logo())

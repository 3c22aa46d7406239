"""Tests that relative links in the documentation lead to existing files and headings, without network access."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "hostfiles/*.md", "beit3_ds/**/*.md", "kernels/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


def without_code(text: str) -> str:
    """Returns a page without fenced blocks and inline code, whose brackets are not links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE))


def links(text: str) -> list[str]:
    """Returns the targets of a page's links and pictures, without links to other sites."""
    found = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", without_code(text))
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", without_code(text), re.MULTILINE)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings: lower case, with hyphens, and numbered if repeated."""
    fenceless = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    seen: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ +(.*?)(?: +#+)?$", fenceless, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def broken_links(page: Path) -> list[str]:
    """Returns the links of a page whose file or heading does not exist."""
    text, broken = page.read_text(encoding="utf-8"), []
    for target in links(text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        is_page = file.suffix == ".md" and file.is_file()
        if not file.exists() or (anchor and is_page and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    """Catches a search that finds nothing, and one that takes code for links."""
    (tmp_path / "other.md").write_text("# The `first` part: *a, b*\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Words\n[a](other.md) [b](other.md#the-first-part-a-b) [c](#words) ![d](none.png) [e](other.md#same-1)\n"
        "[f](other.md#same-2) [g](#none) [h](https://example.org/none) `[i](none.md)` [j](other.md#no-heading)\n"
        "```\n[k](none.md)\n```\n[l]\n\n[l]: gone.md\n"
    )
    assert broken_links(page) == ["none.png", "other.md#same-2", "#none", "other.md#no-heading", "gone.md"]

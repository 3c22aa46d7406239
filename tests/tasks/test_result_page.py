"""Tests HTML pages that show answers."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page


def test_a_page_is_whole_and_harmless(tmp_path: Path) -> None:
    image = Image.new("RGB", (900, 30), "red")
    samples = [
        ShownSample(images=[image], title="fine", lines={"model": "a"}, is_right=True),
        ShownSample(images=[image, image], title="<script>", lines={"model": "b & c"}, is_right=False),
        ShownSample(images=[], title="unknown", lines={}),
    ]
    write_result_page(tmp_path / "page.html", "Answers", {"accuracy": 2 / 3}, samples)
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "b &amp; c" in text and "0.6667" in text
    assert text.count("data:image/jpeg;base64,") == 3 and "http" not in text  # offline
    assert text.index("&lt;script&gt;") < text.index("fine") < text.index("unknown")  # wrong ones first
    assert len(text) < 30_000  # catches images in full size


@given(st.lists(st.sampled_from([True, False, None])), st.integers(1, 12))
def test_chosen_samples(is_right: list[bool | None], count: int) -> None:
    chosen = choose_shown(is_right, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(is_right)) and chosen == sorted(chosen)
    num_wrong = sum(is_right[place] is False for place in chosen)
    assert num_wrong >= min(is_right.count(False), count // 2)

"""The page of before and after."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from drrn.matlab import imresize
from drrn.photos import compare
from drrn.photos.compare import write_page


def pictures(page: Path) -> list[np.ndarray]:
    """The pictures inside a page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_the_page_holds_bicubic_and_the_result_and_needs_nothing_else(tmp_path: Path) -> None:
    photo = skimage.data.chelsea()[60:100, 100:150]
    result = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    Image.fromarray(result).save(tmp_path / "<b>.png")
    write_page(tmp_path / "b.html", tmp_path / "a.png", tmp_path / "<b>.png", "DRRN & co", 10**6)
    before, after = pictures(tmp_path / "b.html")
    np.testing.assert_array_equal(after, result)
    np.testing.assert_allclose(before, np.clip(imresize(photo / 255, 2), 0, 1) * 255, atol=0.51)
    text = re.sub('"data:[^"]+"', '""', (tmp_path / "b.html").read_text())
    assert all(words in text for words in ("&lt;b&gt;.png", "DRRN &amp; co", "100×80 pixels, from 50×40"))
    assert not re.search(r"https?:|\$|<link|src=[^\"]", text)


def test_of_a_large_result_the_middle_is_shown_and_other_kinds_become_8_bits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "SIDE", 30)
    photo = skimage.data.camera()[:10, :30].astype(np.uint16) * 257
    Image.fromarray(photo).save(tmp_path / "a.png")
    large = np.arange(20 * 60, dtype=np.uint16).reshape(20, 60) * 54
    Image.fromarray(large).save(tmp_path / "b.png")
    write_page(tmp_path / "b.html", tmp_path / "a.png", tmp_path / "b.png", "DRRN", 10**6)
    before, after = pictures(tmp_path / "b.html")
    np.testing.assert_allclose(after, large[:, 15:45] / 257, atol=0.51)
    whole = np.clip(imresize(photo / 65535, 2), 0, 1) * 255
    np.testing.assert_allclose(before, whole[:, 15:45], atol=0.51)
    assert "the middle 30×20 of 60×20" in (tmp_path / "b.html").read_text()

from __future__ import annotations

import logging
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from wsss_pipeline.data.image_ids import FoundImages, check_image_id, find_images, without_image_suffix
from wsss_pipeline.errors import ConfigError, ImageError, LabelError


@pytest.mark.parametrize(
    "image_id", ["a", "a/b", "2007_000032", "x.y", "a b/c", "..a", "a..", "猫/犬", "x" * 1000]
)
def test_safe_ids_come_back_unchanged(image_id: str) -> None:
    assert check_image_id(image_id, "labels.txt line 1") == image_id


@pytest.mark.parametrize(
    "image_id",
    [
        *("", "  ", "/etc/passwd", "C:/x", "c:x", "a\\b", "a\0b", "a\nb", "a\x1b[31m", "a\x85b", "a\udcffb"),
        *(".", "..", "a/..", "../a", "a/./b", "a//b", "a/", "x" * 1001),
    ],
)
def test_unsafe_ids_are_refused_in_one_line_with_their_origin(image_id: str) -> None:
    with pytest.raises(LabelError, match=r"labels\.txt line 7") as caught:
        check_image_id(image_id, "labels.txt line 7")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_only_suffixes_of_images_are_cut_off() -> None:
    texts = ["a/b.jpg", "a.JPEG", "a.b", "a.tar.png", "a", "v1.0/a"]
    assert [without_image_suffix(text) for text in texts] == ["a/b", "a", "a.b", "a.tar", "a", "v1.0/a"]


def test_an_image_takes_little_memory_and_has_its_path_all_the_same() -> None:
    images, count = FoundImages(Path("some/folder")), 5000
    tracemalloc.start()
    for number in range(count):
        name = f"part/{number:09}"
        images.add(name, f"{name}.jpg")
    images.sort()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 200 * count, "there may be a million"
    assert images["part/000000007"] == Path("some/folder/part/000000007.jpg")


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_are_found_in_all_depths_sorted_by_id(tmp_path: Path) -> None:
    make(
        tmp_path,
        "b.jpg",
        "a/z.PNG",
        "a/c/d.webp",
        "b.txt",
        ".hidden.jpg",
        "._b.jpg",
        ".cache/x.jpg",
        "a/y.Tiff",
    )
    images = find_images(tmp_path)
    assert list(images) == ["a/c/d", "a/y", "a/z", "b"]
    assert images["a/z"] == tmp_path / "a" / "z.PNG"


def test_a_folder_without_images_gives_none_where_that_is_allowed(tmp_path: Path) -> None:
    assert find_images(tmp_path, may_be_empty=True) == {}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "holds no image, nor any other file; check the folder"),
        (
            ("a.txt", "b/c.txt", "README"),
            "holds no image that is read, but 2 .txt, 1 without a suffix; check",
        ),
        (("a.heic", "b.HEIC", "c.csv"), "but 2 .heic, 1 .csv; install wsss-pipeline[heic], or convert"),
        (("a.jp2",), "but 1 .jp2; convert to JPEG or PNG"),
    ],
)
def test_a_folder_without_images_is_refused_with_what_lies_there(
    tmp_path: Path, without_heic: None, names: tuple[str, ...], said: str
) -> None:
    make(tmp_path, *names)
    with pytest.raises(ImageError) as caught:
        find_images(tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_suffixes_of_the_same_formats_are_images(tmp_path: Path) -> None:
    make(tmp_path, "a.jfif", "b.JPE", "c.pgm", "d.ppm", "e.pnm", "f.pbm")
    assert list(find_images(tmp_path)) == ["a", "b", "c", "d", "e", "f"]
    assert without_image_suffix("x/a.jfif") == "x/a"


def test_images_of_other_formats_are_counted_in_one_line_and_known_by_their_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "a.jpg", "b.jp2", "c/d.JP2", "e.psd", "notes.txt", "labels.csv")
    images = find_images(tmp_path)
    assert list(images) == ["a"]
    assert images.unread == {
        "b": "there, but .jp2 isn't read; convert to JPEG or PNG",
        "c/d": "there, but .jp2 isn't read; convert to JPEG or PNG",
        "e": "there, but .psd isn't read; convert to JPEG or PNG",
    }
    (record,) = caplog.records
    assert "left out: 2 .jp2, 1 .psd; convert to JPEG or PNG" in record.getMessage()
    assert ".txt" not in caplog.text


@pytest.mark.parametrize(
    ("suffix", "ids"),
    [
        (".jpg", ["a/y", "x"]),
        (".JPG", ["a/y", "x"]),
        ("_left", ["z_left"]),
        ("_left.png", ["z_left"]),
        ("*_l*t.png", ["z_left"]),
        ("a/*", ["a/y"]),
        ("[xz]*.???", ["x", "z_left", "z_mask"]),
        ("!_mask", ["a/y", "x", "z_left"]),
        ("!*.png", ["a/y", "x"]),
    ],
)
def test_a_suffix_or_pattern_chooses_the_images(tmp_path: Path, suffix: str, ids: list[str]) -> None:
    make(tmp_path, "x.jpg", "a/y.jpg", "z_left.png", "z_mask.png")
    assert list(find_images(tmp_path, suffix, option="--image-suffix")) == ids


def test_masks_of_the_same_name_beside_images_are_left_out_by_suffix(tmp_path: Path) -> None:
    make(tmp_path, "x.jpg", "x.png")
    with pytest.raises(ImageError, match=r"have the same image id 'x'; rename .*: --image-suffix \.jpg"):
        find_images(tmp_path, option="--image-suffix")
    assert find_images(tmp_path, ".jpg", option="--image-suffix") == {"x": tmp_path / "x.jpg"}
    assert find_images(tmp_path, ".png", option="--gt-suffix", strip=True) == {"x": tmp_path / "x.png"}


@pytest.mark.parametrize("suffix", ["_mask", "_MASK", "_mask.png"])
def test_a_suffix_is_stripped_and_chooses(tmp_path: Path, suffix: str) -> None:
    make(tmp_path, "x.jpg", "x_mask.png", "a/y_mask.png", "z.png")
    assert list(find_images(tmp_path, suffix, option="--gt-suffix", strip=True)) == ["a/y", "x"]


@pytest.mark.parametrize("suffix", ["*_mask", "!_mask", "a/x"])
def test_a_pattern_cannot_be_stripped(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ConfigError, match=r"--gt-suffix .*write what the names end in"):
        find_images(tmp_path, suffix, option="--gt-suffix", strip=True)


def test_a_suffix_that_no_image_has_is_refused_with_its_option(tmp_path: Path) -> None:
    make(tmp_path, "x.jpg", "y.jpg")
    with pytest.raises(ImageError, match="none of its 2 images is of --image-suffix _left; check"):
        find_images(tmp_path, "_left", option="--image-suffix")


def test_masks_among_the_images_are_warned_of_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "cat/x.jpg", "cat/x_mask.png", "cat/y.jpg", "cat/y_mask.png", "gas_mask.jpg")
    found = find_images(tmp_path, option="--image-suffix")
    assert len(found) == 5
    assert "2 files look like masks of other images, such as cat/x_mask, cat/y_mask" in caplog.text
    assert "--image-suffix '!_mask'" in caplog.text
    caplog.clear()
    assert list(find_images(tmp_path, "!_mask", option="--image-suffix")) == ["cat/x", "cat/y"]
    assert not caplog.text


def test_a_folder_of_masks_beside_the_images_is_warned_of_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "v/images/x.jpg", "v/images/y.jpg", "v/masks/x.png", "v/masks/y.png", "v/masks/z.png")
    assert len(find_images(tmp_path, option="--image-suffix")) == 5
    assert "2 files look like masks of other images, such as v/masks/x, v/masks/y" in caplog.text
    assert "--image-suffix '!v/masks/*'" in caplog.text
    caplog.clear()
    assert list(find_images(tmp_path, "!v/masks/*", option="--image-suffix")) == ["v/images/x", "v/images/y"]
    make(tmp_path / "classes", "mask/x.jpg", "hat/y.jpg")
    find_images(tmp_path / "classes", option="--image-suffix")
    assert not caplog.text


def test_two_images_with_one_id_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a/b.jpg", "a/b.png")
    with pytest.raises(ImageError, match=r"b\.jpg and .*b\.png have the same image id 'a/b'"):
        find_images(tmp_path)


def test_links_are_followed_without_end_and_each_folder_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make(root, "z/a.jpg")
    make(elsewhere, "b.jpg", "below/c.jpg")
    (root / "z" / "loop").symlink_to(root)
    (root / "around").symlink_to(tmp_path)
    (root / "a_second_way_to_z").symlink_to(root / "z")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)
    assert list(find_images(root)) == ["linked/b", "linked/below/c", "z/a"]


def test_a_linked_image_counts_even_where_its_file_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert list(find_images(tmp_path)) == ["gone"]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "set.jpg/a.png")
    assert list(find_images(tmp_path)) == ["set.jpg/a"]


@pytest.mark.parametrize("name", ["missing", "file.txt"])
def test_a_root_that_is_no_folder_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(ImageError, match=name):
        find_images(tmp_path / name)


def test_a_file_name_that_cannot_be_an_id_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "a\\b.jpg")
    make(tmp_path, "good.jpg")
    assert list(find_images(tmp_path)) == ["good"]
    assert "backslash; rename the file" in caplog.text


def test_a_thousand_unfit_names_bring_a_few_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1000):
        (tmp_path / f"{number}\x1b.png").touch()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ImageError, match="no image whose name can be an id"),
    ):
        find_images(tmp_path)
    assert len(caplog.records) == 21
    assert "and 980 more files whose image ids can't be used" in caplog.text


def test_a_deep_folder_is_named_in_a_short_line(tmp_path: Path) -> None:
    """Deeper than a path may be long."""
    opened = [os.open(tmp_path, os.O_RDONLY)]
    for _ in range(2500):
        os.mkdir("d", dir_fd=opened[-1])
        opened.append(os.open("d", os.O_RDONLY, dir_fd=opened[-1]))
        os.close(opened.pop(-2))
    os.close(opened[-1])
    with pytest.raises(ImageError) as caught:
        find_images(tmp_path)
    assert len(str(caught.value)) < 400
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own way is too long for it

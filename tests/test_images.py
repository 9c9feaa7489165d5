"""Images, labels and folders as people have them: what is read, what is refused, and by which name."""

import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from transformers import CLIPModel
from world import NAMES, dataset, png

from hf_gatelora.cli import main
from hf_gatelora.evaluation.images import LabelledImages, eval_sets, load_images
from hf_gatelora.evaluation.labels import read_class_names
from hf_gatelora.records import read_results

NFC = ["café", "zoë"]
NFD = [unicodedata.normalize("NFD", name) for name in NFC]


def encoded(image: PILImage.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def decoded(tmp_path: Path, stored: bytes | None) -> np.ndarray:
    """What the model's transform gets of one stored image, called x.img."""
    rows = {"image": [None if stored is None else {"bytes": stored, "path": "x.img"}]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "one.parquet")
    pixels = LabelledImages(str(tmp_path / "one.parquet"), np.asarray)[0]["pixel_values"]
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    return pixels


def labelled(tmp_path: Path, feature, values: list, **settings) -> LabelledImages:
    rows = {"image": [{"bytes": png(0, 0), "path": None}] * len(values), "label": values}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": feature})).save_to_disk(tmp_path / "saved")
    return LabelledImages(str(tmp_path / "saved"), np.asarray, **settings)


def tree(root: Path, *files: str) -> str:
    """A folder with a small image, or a text, in each of these files."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(png(0, 0) if file.endswith(".png") else b"text")
    return str(root)


def classes(source: str, **settings) -> tuple[list[str] | None, list[int] | None]:
    data = LabelledImages(source, np.asarray, **settings)
    return data.class_names, None if data.labels is None else data.labels.tolist()


# ---- one image

UPRIGHT = {  # EXIF orientation: what a viewer does to the stored pixels
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_upright(kind, orientation, tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    stored = encoded(PILImage.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(tmp_path, stored), UPRIGHT[orientation](pixels))


def test_a_phone_photo_in_a_folder_is_upright(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    tree(tmp_path, "b/1.png")
    (tmp_path / "a").mkdir()
    PILImage.new("RGB", (30, 20)).save(tmp_path / "a" / "phone.JPG", "JPEG", exif=exif)
    assert LabelledImages(str(tmp_path), np.asarray)[0]["pixel_values"].shape == (30, 20, 3)


def test_broken_exif_does_not_cost_the_image(tmp_path):
    stored = encoded(PILImage.new("RGB", (6, 4), "red"), "JPEG", exif=b"Exif\0\0garbage, not a TIFF header")
    assert decoded(tmp_path, stored).shape == (4, 6, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greyscale_keeps_its_range(kind, mode, tmp_path):
    ramp = np.linspace(0, 65535, 600).reshape(20, 30).round()
    image = PILImage.frombytes(mode, (30, 20), ramp.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    if (kind, mode) == ("PPM", "I;16B"):
        image = image.convert("I")
    pixels = decoded(tmp_path, encoded(image, kind))
    assert pixels.mean() == pytest.approx(127.5, abs=0.01)
    np.testing.assert_array_equal(pixels[..., 1], np.rint(ramp * 255 / 65535))
    assert (pixels == pixels[..., :1]).all()


def test_16_bit_greyscale_is_upright_too(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 8
    ramp = 257 * np.arange(24, dtype=np.uint16).reshape(4, 6)
    pixels = decoded(tmp_path, encoded(PILImage.fromarray(ramp), exif=exif))
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(ramp // 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_greyscale_of_unknown_range_is_refused(dtype, tmp_path):
    stored = encoded(PILImage.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(ValueError, match=r"row 0 \(x\.img\): .*32-bit greyscale.*save it with 8 or 16 bits"):
        decoded(tmp_path, stored)


def with_palette(transparency) -> bytes:
    image = PILImage.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=transparency)


WHITE = (255, 255, 255)
MODES = {  # the stored image and its first pixels as a viewer shows them
    "palette": (with_palette(None), [(200, 0, 0), (0, 200, 0)]),
    "palette_with_a_transparent_colour": (with_palette(0), [WHITE, (0, 200, 0)]),
    "palette_with_alpha": (with_palette(b"\x00\xff"), [WHITE, (0, 200, 0)]),
    "rgb_with_a_transparent_colour": (
        encoded(PILImage.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)),
        [WHITE],
    ),
    "rgba_opaque": (encoded(PILImage.new("RGBA", (1, 1), (1, 2, 3, 255))), [(1, 2, 3)]),
    "rgba_transparent": (encoded(PILImage.new("RGBA", (1, 1), (0, 0, 0, 0))), [WHITE]),
    "grey_half_transparent": (encoded(PILImage.new("LA", (1, 1), (0, 51))), [(204, 204, 204)]),
    "one_bit": (encoded(PILImage.fromarray(np.array([[False, True]]))), [(0, 0, 0), WHITE]),
    "cmyk": (encoded(PILImage.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [(0, 255, 255)]),
    "grey": (encoded(PILImage.new("L", (1, 1), 7)), [(7, 7, 7)]),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, tmp_path):
    stored, expected = MODES[mode]
    assert [tuple(pixel) for pixel in decoded(tmp_path, stored)[0].tolist()] == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind, tmp_path):
    frames = [PILImage.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    more = {"lossless": True} if kind == "WEBP" else {}
    stored = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **more)
    assert PILImage.open(io.BytesIO(stored)).n_frames == 3
    assert decoded(tmp_path, stored)[0, 0].tolist() == [255, 0, 0]


NOISE = PILImage.effect_noise((64, 64), 90)
UNREADABLE = {
    "empty": (b"", r"row 0 \(x\.img\): .*empty, damaged, or of a format"),
    "a_text": (b"no image", r"row 0 \(x\.img\): .*empty, damaged, or of a format"),
    "truncated_jpeg": (
        encoded(NOISE, "JPEG")[:900],
        r"row 0 \(x\.img\): the image cannot be read \(image file is trunc",
    ),
    "truncated_png": (encoded(NOISE)[:900], r"row 0 \(x\.img\): the image cannot be read"),
    "truncated_tiff": (encoded(NOISE, "TIFF")[:900], r"row 0 \(x\.img\): the image cannot be read"),
    "truncated_webp": (encoded(NOISE, "WEBP")[:300], r"row 0 \(x\.img\): the image cannot be read"),
    "200_megapixels": (b"P4 20000 10000\n", r"row 0 \(x\.img\): .*Image size \(200000000 pixels\).*; scale it down\)"),
    "100_megapixels": (b"P4 10000 10000\n", r"row 0 \(x\.img\): .*Image size \(100000000 pixels\).*; scale it down\)"),
    "missing": (None, r"one\.parquet, row 0: the image cannot be read \(there is none\)"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_images_are_named_by_row_and_file(case, tmp_path):
    """As warnings are errors here, Pillow's warning (from 89 megapixels on) is one too."""
    stored, message = UNREADABLE[case]
    with pytest.raises(ValueError, match=message) as error:
        decoded(tmp_path, stored)
    assert "\n" not in str(error.value)


def test_images_are_opened_on_access_only(tmp_path):
    source = tree(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b" / "2.png").write_bytes(b"")
    (tmp_path / "b" / "3.png").symlink_to(tmp_path / "gone.png")
    data = LabelledImages(source, np.asarray)
    assert data.labels.tolist() == [0, 1, 1]
    data[0]
    with pytest.raises(ValueError, match=r"row 1 \(.*/b/2\.png\): .*empty"):
        data[1]
    with pytest.raises(ValueError, match=r"row 2 \(.*/b/3\.png\): .*No such file"):
        data[2]


# ---- labels


@pytest.mark.parametrize("dtype", ["string", "large_string", "string_view"])
def test_names_of_every_type_of_string(dtype, tmp_path):
    data = labelled(tmp_path, Value(dtype), ["dog", "cat", "dog"])
    assert (data.class_names, data.labels.tolist()) == (["cat", "dog"], [1, 0, 1])


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_numbers_need_names(dtype, tmp_path):
    values = [True, False] if dtype == "bool" else [1, 0]
    with pytest.raises(
        ValueError, match=rf"column 'label' holds Value\('{dtype}'\), without class names.*--class_names FILE"
    ):
        labelled(tmp_path, Value(dtype), values)
    given = {"label_names": ["cat", "dog"]}
    data = labelled(tmp_path, Value(dtype), values, **given)
    assert (data.class_names, data.labels.tolist()) == (["cat", "dog"], [1, 0])
    # The classes of another set, in its order, are not the meaning of these numbers.
    data = labelled(tmp_path, Value(dtype), values, class_names=["owl", "dog", "cat"], **given)
    assert (data.class_names, data.labels.tolist()) == (["owl", "dog", "cat"], [1, 2])
    with pytest.raises(ValueError, match="without class names"):
        labelled(tmp_path, Value(dtype), values, class_names=["owl", "dog", "cat"])


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        (Value("string"), ["cat", None], "row 1: label None lies outside the 1 classes"),
        (Value("string"), ["cat", ""], "row 1: label '' lies outside the 1 classes"),
        (Value("int64"), [0, None], "row 1: label None lies outside the 2 classes"),
        (Value("int64"), [0, -1], "row 1: label -1 lies outside the 2 classes"),
        (Value("int64"), [0, 2], r"row 1: label 2 lies outside the 2 classes \(cat, dog\)"),
        (ClassLabel(names=["cat", "dog"]), [0, -1], "row 1: label -1 lies outside the 2 classes"),
        (ClassLabel(names=["cat", "dog"]), [0, None], "row 1: label None lies outside the 2 classes"),
        (Value("float64"), [0.0, 1.0], r"column 'label' holds Value\('float64'\)"),
        (List(Value("int64")), [[0], [1]], r"column 'label' holds List\("),
    ],
)
def test_labels_outside_the_classes(feature, values, message, tmp_path):
    with pytest.raises(ValueError, match=rf"saved, {message}"):
        labelled(tmp_path, feature, values, label_names=["cat", "dog"])


@pytest.mark.parametrize(("stored", "known"), [(NFC, NFD), (NFD, NFC)])
def test_accents_are_compared_in_any_spelling(stored, known, tmp_path):
    for feature in (Value("string"), ClassLabel(names=stored)):
        data = labelled(tmp_path, feature, [stored[1], stored[0]], class_names=["owl", *known])
        assert (data.class_names, data.labels.tolist()) == (["owl", *NFC], [2, 1])
    source = tree(tmp_path / "photos", *(f"{name}/1.png" for name in stored))
    assert classes(source) == (NFC, [0, 1])
    assert classes(source, class_names=known[::-1]) == (NFC[::-1], [1, 0])


def test_one_name_in_two_spellings_is_one_class(tmp_path):
    assert labelled(tmp_path, Value("string"), [NFC[0], NFD[0]]).labels.tolist() == [0, 0]
    assert classes(tree(tmp_path / "photos", f"{NFC[0]}/1.png", f"{NFD[0]}/1.png")) == (NFC[:1], [0, 0])


def test_names_that_stand_for_two_classes(tmp_path):
    """As two of ImageNet's do: numbers still mean what they say, names do not."""
    names = ["missile", "missile", "owl"]
    assert labelled(tmp_path, Value("int64"), [1, 0, 2], label_names=names).labels.tolist() == [1, 0, 2]
    assert labelled(tmp_path, Value("string"), ["owl"], class_names=names).labels.tolist() == [2]
    with pytest.raises(ValueError, match="row 1: label 'missile' is the name of several of the 3 classes"):
        labelled(tmp_path, Value("string"), ["owl", "missile"], class_names=names)


@pytest.mark.parametrize(
    "text",
    [
        "cat\nred panda\n",
        "\ufeffcat\r\nred panda\r\n\r\n",
        '["cat", "red panda"]',
        '\n{"1": "red panda", "0": "cat"}',
    ],
)
def test_class_names_from_a_file(text, tmp_path):
    (tmp_path / "names").write_bytes(text.encode())
    assert read_class_names(str(tmp_path / "names")) == ["cat", "red panda"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "class 0 has no name"),
        (b"cat\n\ndog\n", "class 1 has no name"),
        (b"[]", "class 0 has no name"),
        (b'["cat", 3]', "class 1 has no name"),
        (b'{"0": "cat", "2": "dog"}', "class 1 has no name"),
        (b'{"cat": 0}', "class 0 has no name"),
        (b'["cat", ', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "is not a file"),
    ],
)
def test_bad_files_of_class_names(content, message, tmp_path):
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    with pytest.raises(ValueError, match=rf"names:? .*{message}"):
        read_class_names(str(tmp_path / "names"))


# ---- folders


def test_a_metadata_file_names_the_classes(tmp_path):
    source = tree(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    assert classes(source) == (["cat", "dog"], [0, 1])
    (tmp_path / "metadata.csv").unlink()
    rows = [{"image_file_name": f"{i}.png", "label": i - 1, "caption": f"number {i}"} for i in (2, 1)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = LabelledImages(source, np.asarray, label_names=["cat", "dog"])
    assert (data.labels.tolist(), data.captions) == ([1, 0], ["number 2", "number 1"])
    assert data[0]["pixel_values"].shape == (16, 16, 3)


def test_one_class_of_a_known_list(tmp_path, caplog):
    source = tree(tmp_path, "dog/1.png", "dog/2.png")

    def load(source, names):
        return LabelledImages(source, np.asarray, class_names=names)

    (found,) = eval_sets("ood", {"photo": source}, load, ["cat", "dog"])
    assert (found.labels.tolist(), found.class_names) == ([1, 1], ["cat", "dog"])
    assert not caplog.records
    assert classes(source) == (["dog"], [0, 0])
    assert "has one class only, dog" in caplog.text


@pytest.mark.parametrize(
    ("files", "stray"),
    [
        (["cat/1.png", "dog/1.png", "overview.png"], "overview.png"),
        (["cat/1.png", "dog/1.png", "dog/old/2.png"], "dog/old/2.png"),
        (["1.png", "2.png", "3.png", "cat/1.png"], "cat/1.png"),
        (["train/cat/1.png", "train/dog/1.png", "train/x.png", "test/x.png"], "train/x.png"),
    ],
)
def test_a_stray_image_is_named(files, stray, tmp_path):
    with pytest.raises(ValueError, match=f": {stray} lies at another depth than most images"):
        classes(tree(tmp_path, *files))


@pytest.mark.parametrize("name", ["[2024]", "a*b", "what?", "x[!y]", ".hidden", "__pycache__", "a:b"])
def test_the_name_of_a_folder_does_not_matter(name, tmp_path):
    root = tmp_path / name
    assert classes(tree(root / "photos", "cat/1.png", "[dog]/1.png")) == (["[dog]", "cat"], [0, 1])
    assert classes(str(root / "photos" / "[dog]")) == (None, None)
    tree(root / "described", "1.png")
    (root / "described" / "metadata.csv").write_text("file_name,label\n1.png,cat\n")
    assert classes(str(root / "described")) == (["cat"], [0])
    dataset(4).to_parquet(root / "data.parquet")
    dataset(4).save_to_disk(root / "saved")
    for source in ("data.parquet", "saved"):
        assert classes(str(root / source)) == (NAMES, [0, 1, 2, 3])


SPLIT_LAYOUTS = {
    "plain": ("train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "test/dog/2.png"),
    "spelled": ("Training/cat/1.png", "Training/dog/1.png", "eval/dog/1.png", "eval/dog/2.png"),
    "numbered": ("train2017/cat/1.png", "train2017/dog/1.png", "test2017/dog/1.png", "test2017/dog/2.png"),
    "wrapped": ("data/train/cat/1.png", "data/train/dog/1.png", "data/test/dog/1.png", "data/test/dog/2.png"),
    "with_others": (
        *("train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "test/dog/2.png"),
        *("overview.png", "extra/owl/1.png"),
    ),
}


@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_folders_of_splits(layout, tmp_path):
    """The classes are those of all splits, in each of them."""
    source = tree(tmp_path, *SPLIT_LAYOUTS[layout])
    assert classes(source) == (["cat", "dog"], [0, 1])
    assert classes(f"{source}:train") == (["cat", "dog"], [0, 1])
    assert classes(f"{source}:test") == (["cat", "dog"], [1, 1])
    with pytest.raises(ValueError, match=r":validation: .*it is one of \['test', 'train'\]"):
        classes(f"{source}:val")


def test_splits_without_classes_and_classes_called_like_splits(tmp_path):
    source = tree(tmp_path / "flat", "train/1.png", "test/1.png", "test/2.png")
    assert classes(source) == (None, None)
    assert len(LabelledImages(f"{source}:test", np.asarray)) == 2
    assert classes(tree(tmp_path / "a", "train/1.png", "car/1.png")) == (["car", "train"], [0, 1])
    assert classes(tree(tmp_path / "b", "test tube/1.png", "train station/1.png")) == (
        ["test tube", "train station"],
        [0, 1],
    )
    with pytest.raises(ValueError, match=r":train: .*it is one of \['test'\]\. Give one as path:split"):
        classes(tree(tmp_path / "c", "test/cat/1.png", "test/dog/1.png"))


def test_hidden_files_and_other_files_are_left_out(tmp_path, caplog):
    files = ["cat/1.png", "dog/1.png", "dog/2.PNG.png", "cat/._1.png", ".cache/1.png", "__MACOSX/cat/1.png"]
    source = tree(tmp_path, *files, "cat/.DS_Store", "README.md", "dog/notes.txt", "Thumbs.db")
    assert classes(source) == (["cat", "dog"], [0, 1, 1])
    assert not caplog.records


def test_an_empty_class_folder_is_told(tmp_path, caplog):
    source = tree(tmp_path, "cat/1.png", "dog/1.png", "notes/1.txt")
    (tmp_path / "owl").mkdir()
    assert classes(source) == (["cat", "dog"], [0, 1])
    assert f"{tmp_path / 'owl'} holds no images, so it is not one of the classes" in caplog.text
    assert f"{tmp_path / 'notes'} holds no images" in caplog.text
    with pytest.raises(ValueError, match="owl holds no images"):
        load_images(str(tmp_path / "owl"))


def test_links_to_folders_are_followed_once(tmp_path):
    tree(tmp_path / "elsewhere", "1.png", "2.png")
    source = tree(tmp_path / "photos", "cat/1.png")
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    (tmp_path / "whole").symlink_to(tmp_path / "photos")
    for path in (source, str(tmp_path / "whole")):
        assert classes(path) == (["cat", "dog"], [0, 1, 1])


def test_paths_may_be_relative(tmp_path, monkeypatch):
    tree(tmp_path / "photos", "cat/1.png", "dog/1.png")
    monkeypatch.chdir(tmp_path)
    data = LabelledImages("photos", np.asarray)
    os.chdir("/")
    assert data[1]["pixel_values"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("bad.parquet", b"PAR1 no parquet"),
        ("bad.arrow", b"no arrow"),
        ("bad/metadata.csv", b"file_name,label\n1.png,cat,dog,owl\n2.png\n"),
        ("bad/metadata.csv", b"name,label\n1.png,cat\n"),
        ("bad/metadata.csv", b"left_file_name,right_file_name\n1.png,1.png\n"),
        ("bad/metadata.csv", b"file_name,label\n../../1.png,cat\n"),
        ("bad/metadata.csv", b"file_name,label\n/1.png,cat\n"),
        ("bad/metadata.csv", b"file_name,label\n,cat\n"),
        ("bad/metadata.csv", b"file_name,label\n"),
        ("bad/metadata.csv", b""),
        ("bad/metadata.jsonl", b"{nothing\n"),
        ("bad/metadata.parquet", b"PAR1 no parquet"),
        ("bad/state.json", b"{}"),
        ("bad/state.json", b"[]"),
        ("bad/state.json", b"no JSON"),
        ("bad/dataset_dict.json", b"[]"),
    ],
)
def test_files_that_cannot_be_read_are_named(file, content, tmp_path):
    tree(tmp_path, "bad/1.png")
    (tmp_path / "bad" / "dataset_info.json").write_text("{}")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read|holds no|needs one column|is not a file") as error:
        load_images(str(tmp_path / file.partition("/")[0]))
    assert str(error.value).startswith(f"{tmp_path}/bad")
    assert "\n" not in str(error.value)


def test_metadata_is_read_as_it_is_written(tmp_path):
    """Names such as NA are classes, captions hold commas and line ends, and every split has its own file."""
    source = tree(tmp_path, "train/a/1.png", "train/a/2.png", "test/1.png", "test/unlisted.png")
    text = 'file_name,label,caption\n2.png,NA,"one, two\nthree"\n1.png,null,\n'
    (tmp_path / "train" / "a" / "metadata.csv").write_text(text)
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label,caption\n1.png,NA,x\n")
    data = LabelledImages(source, np.asarray)
    assert (data.class_names, data.labels.tolist(), data.captions) == (["NA", "null"], [0, 1], ["one, two\nthree", ""])
    assert data.data[0]["image"]["path"] == f"{tmp_path}/train/a/2.png"
    assert classes(f"{source}:test") == (["NA"], [0])
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a/1.png"}')
    with pytest.raises(ValueError, match="metadata of several kinds"):
        classes(source)


# ---- the command


def test_evaluate_names_numbers_by_a_file(world, tmp_path, capsys):
    model = get_peft_model(CLIPModel.from_pretrained(world / "model"), LoraConfig(target_modules=["fc1"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    dataset(label=Value("int64")).to_parquet(tmp_path / "numbers.parquet")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))

    def values(source, *more):
        line = ["evaluate", tmp_path / "adapter", "--id", source, "--ood", f"two={world / 'folder'}", *more]
        status = main([str(word) for word in [*line, "--prompt", "a {} square", "--output", tmp_path / "r.jsonl"]])
        return status, {(r["method"], r["data"], r["metric"]): r["value"] for r in read_results(tmp_path / "r.jsonl")}

    status, expected = values(world / "data.parquet")
    assert status == 0
    (tmp_path / "r.jsonl").unlink()
    assert values(tmp_path / "numbers.parquet", "--class_names", tmp_path / "names.txt") == (0, expected)
    line = ["evaluate", str(tmp_path / "adapter"), "--id", str(tmp_path / "numbers.parquet")]
    assert main([*line, "--output", str(tmp_path / "r.jsonl")]) == 2
    assert "holds Value('int64'), without class names" in capsys.readouterr().err

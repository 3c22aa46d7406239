"""Tests networks of the three optional libraries as teachers, with random weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beit3_ds.config import ConfigError, TeacherConfig, VisualTokenizerConfig
from beit3_ds.tokenizers import Teacher, build_teacher
from beit3_ds.tokenizers.teacher import describe_teacher
from beit3_ds.tokenizers.weights import load_weights


def config(teacher: str, weights: Path | str | None = None, stage: int = -1) -> TeacherConfig:
    return TeacherConfig(teacher=teacher, teacher_weights=weights and str(weights), teacher_stage=stage)


def build(teacher: TeacherConfig, **changes: int) -> Teacher:
    """Builds a teacher for images of 3 x 3 patches; `changes` replace these sizes."""
    return build_teacher(teacher, VisualTokenizerConfig(path="x", **({"image_size": 24, "patch_size": 8} | changes)))


def timm_weights(folder: Path, name: str, **options: Any) -> tuple[Any, Path]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **options)
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return model.eval(), path


def test_features_of_a_convolutional_network_fall_on_the_grid(tmp_path: Path) -> None:
    model, path = timm_weights(tmp_path, "tf_efficientnet_lite0")
    teacher = build(config("timm:tf_efficientnet_lite0", path, stage=3))
    pixels = torch.rand(2, 3, 24, 24) * 2 - 1
    features = teacher(pixels)
    assert features.shape == (2, 9, 112) and teacher.width == 112 and features.dtype == torch.float32
    seen = F.interpolate(pixels, (48, 48), mode="bicubic", antialias=True).clamp(-1, 1)  # stride 16: no map resampled
    # The model normalises by mean 0.5 and deviation 0.5: its input is the view itself.
    expected = model.forward_intermediates(seen, intermediates_only=True)[3].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected)  # catches training-mode norms, another stage, a transposed grid


def test_transformers_of_timm_see_their_own_normalisation_and_grid(tmp_path: Path) -> None:
    model, path = timm_weights(tmp_path, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    teacher = build(config("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", path))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    model.set_input_size(img_size=(48, 48))
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    expected = model.forward_features(((pixels + 1) / 2 - mean) / std)[:, 1:]
    torch.testing.assert_close(teacher(pixels), expected.detach())  # patch tokens after the last norm, without CLS


def test_a_teacher_is_frozen_and_does_not_learn(tmp_path: Path) -> None:
    _, path = timm_weights(tmp_path, "tf_efficientnet_lite0")
    teacher = build(config("timm:tf_efficientnet_lite0", path))
    pixels = (torch.rand(2, 3, 24, 24) * 2 - 1).requires_grad_()
    first = teacher(pixels)
    assert not first.requires_grad
    assert torch.equal(teacher(pixels), first)  # catches batch norms that keep learning


def test_weights_under_other_names_are_taken_in_order(tmp_path: Path) -> None:
    model, path = timm_weights(tmp_path, "tf_efficientnet_lite0")
    renamed = {f"_{name.replace('conv', 'convolution')}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": renamed}, path)
    timm = pytest.importorskip("timm")
    other = timm.create_model("tf_efficientnet_lite0")
    load_weights(other, path)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, path = timm_weights(tmp_path, "tf_efficientnet_lite0")
    state = model.state_dict()
    state.pop("classifier.bias")
    torch.save(state, path)  # most names agree: order must not decide
    with pytest.raises(ConfigError, match=r"1 are missing \(classifier\.bias\)"):
        load_weights(model, path)
    torch.save({f"x.{name}": value for name, value in reversed(model.state_dict().items())}, path)
    with pytest.raises(ConfigError, match="shapes in order differ"):
        load_weights(model, path)
    torch.save({"model": model}, path)  # a pickled module could run code
    with pytest.raises(ConfigError, match="cannot be read as a file of tensors"):
        load_weights(model, path)


def test_open_clip_gives_projected_patch_tokens(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    path = tmp_path / "clip.pt"
    model = open_clip.create_model("ViT-S-32-alt", force_image_size=96).eval()
    torch.save(model.state_dict(), path)
    teacher = build(config("open_clip:ViT-S-32-alt", path))
    pixels = torch.rand(2, 3, 96, 96) * 2 - 1
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    model.visual.output_tokens = True
    _, tokens = model.visual(((pixels + 1) / 2 - mean) / std)
    torch.testing.assert_close(teacher(pixels), (tokens @ model.visual.proj).detach())
    with pytest.raises(ConfigError, match="must be open_clip:ARCHITECTURE/TAG"):
        build(config("open_clip:ViT-S-32-alt"))


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_transformers_gives_patch_tokens(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    if kind == "clip":
        vision = transformers.CLIPVisionConfig(intermediate_size=32, **small)
        text = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=99)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=12)
        )
        transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**small))
        transformers.BitImageProcessor().save_pretrained(tmp_path)
    model.eval().save_pretrained(tmp_path)
    teacher = build(config(f"transformers:{tmp_path}"), image_size=32, patch_size=8)  # 4 x 4 patches of 16 px
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    images = ((pixels + 1) / 2 - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(
        processor.image_std
    ).view(3, 1, 1)
    if kind == "clip":
        tokens = model.vision_model(images).last_hidden_state[:, 1:]
        expected = model.visual_projection(model.vision_model.post_layernorm(tokens))
    else:
        expected = model(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(pixels), expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        build(config("open_clip:ViT-B-16/openai"))


def test_names_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'clip' is neither oriented_gradients nor LIBRARY:NAME"):
        config("clip")
    with pytest.raises(ConfigError, match="does not exist"):
        build(config("timm:tf_efficientnet_lite0", tmp_path / "absent.pth"))
    _, path = timm_weights(tmp_path, "tf_efficientnet_lite0")
    with pytest.raises(ConfigError, match=r"teacher_stage is 5; .* 0 to 4 .* strides 2, 4, 8, 16, 32"):
        build(config("timm:tf_efficientnet_lite0", path, stage=5))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(config("timm:no_such_network", path))


def test_the_description_names_network_and_weights() -> None:
    named = config("timm:tf_efficientnet_lite0", "lite0.pth", stage=3)
    text = describe_teacher(named)
    assert text == "patch features of timm:tf_efficientnet_lite0, feature map 3, weights of lite0.pth"
    assert "hand-made" in describe_teacher(config("oriented_gradients"))

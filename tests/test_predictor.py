"""A trained model is saved with what makes its inputs, and used again by names alone; what can't be known is asked for."""

import functools
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import save_file

from mope_fast import FeatureCache, FusionCollator, MoPEConfig, MoPEFusion, Predictor, PromptTuned, Side, predict
from mope_fast.data import EachFrame, StackEach, TimmTransform
from mope_fast.encoders import encode
from mope_fast.encoders.sources import load_source, source_of
from mope_fast.models import checkpoint
from mope_fast.prediction import kept as predicting

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "which", "color", "red", "blue", "green", "is", "it"]
NAMES = ["red", "blue", "green"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CONFIG = MoPEConfig(num_experts=3, prompt_length=2, complementary_prompt_length=2)
VIT = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2, "num_classes": 0, "global_pool": "avg"}
TEXTS = ["which color is it", "red", "blue green red is it", "it is green"]


def louder(encoder):
    """Weights that show."""
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Encoders on disk, as a user has them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("home")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=16))
    louder(bert).save_pretrained(folder / "bert")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    louder(transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8))).save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    save_file(louder(timm.create_model("vit_tiny_patch16_224", **VIT)).state_dict(), folder / "timm.safetensors")
    for i in range(4):
        pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def bert(home):
    return transformers.BertModel.from_pretrained(home / "bert")


def vit(home):
    return transformers.ViTModel.from_pretrained(home / "vit")


def timm_vit(home):
    overlay = {"file": str(home / "timm.safetensors"), "custom_load": False, "mean": (0.25, 0.5, 0.75)}
    return timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **VIT).eval()


def tokenizer(home):
    return transformers.AutoTokenizer.from_pretrained(home / "bert")


def processor(home):
    return transformers.AutoImageProcessor.from_pretrained(home / "vit")


def samples(home):
    return [{"text": text, "image": str(home / f"{i}.png")} for i, text in enumerate(TEXTS)]


def loud(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model.eval()


def fusion(home, config=CONFIG, **settings):
    return loud(MoPEFusion(bert(home), vit(home), 3, config, **settings))


def predictor(home, model=None, names=NAMES):
    return Predictor(fusion(home) if model is None else model, FusionCollator(tokenizer(home), processor(home)), names)


def only_text(home, **settings):
    return Predictor(
        loud(PromptTuned(bert(home), 2, 3, **settings)),
        FusionCollator(tokenizer(home), None, complementary_field=None),
        None if settings else NAMES,
    )


def shown(predictions):
    """Rounded: a folded model is equal to rounding."""
    return [
        (p.label, p.probabilities and pytest.approx(p.probabilities, abs=1e-5), p.experts and [index for index, _ in p.experts])
        for p in predictions
    ]


def same(got, expected):
    return [(p.label, p.probabilities, p.experts and [index for index, _ in p.experts]) for p in got] == shown(expected)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def fused_text_and_image(home):
    inputs = functools.partial(tokenizer(home), padding=True, truncation=True, max_length=4, return_tensors="pt")
    return Predictor(fusion(home), FusionCollator(inputs, processor(home)), NAMES)


def fused_image_of_timm_and_text(home):
    encoder = timm_vit(home)
    collate = FusionCollator(TimmTransform.of(encoder), tokenizer(home), main_field="image", complementary_field="text")
    return Predictor(loud(MoPEFusion(encoder, bert(home), 3, CONFIG)), collate, NAMES)


def only_images(home):
    encoder = timm_vit(home)
    collate = FusionCollator(TimmTransform.of(encoder), None, main_field="image", complementary_field=None)
    return Predictor(loud(PromptTuned(encoder, 2, 3)), collate, NAMES)


def frozen_function(home):
    function = functools.partial(encode, vit(home).requires_grad_(False), pooling="mean")
    model = loud(MoPEFusion(bert(home), function, 3, MoPEConfig(**{**CONFIG.to_dict(), "cross_dim": 16})))
    return predictor(home, model)


def cached_features(home):
    cache = FeatureCache(home / "features", vit(home), pooling="cls+mean")
    return predictor(home, loud(MoPEFusion(bert(home), cache, 3, CONFIG)))


KINDS = [fused_text_and_image, fused_image_of_timm_and_text, only_text, only_images, frozen_function, cached_features]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("make", KINDS)
def test_what_was_saved_predicts_the_same_by_names_alone(home, tmp_path, make):
    made = make(home)
    expected = list(made(samples(home)))
    made.save_pretrained(tmp_path / "adapter")
    loaded = Predictor.from_pretrained(tmp_path / "adapter")
    assert same(loaded(samples(home)), expected)
    probabilities = torch.tensor([list(prediction.probabilities.values()) for prediction in expected])
    assert (probabilities[:, None] - probabilities).abs().amax(-1).add(torch.eye(4)).min() > 1e-3  # all differ
    # what was loaded is saved as what it was loaded from
    loaded.save_pretrained(tmp_path / "again")
    before, after = (json.loads((tmp_path / name / checkpoint.DESCRIPTION).read_text()) for name in ("adapter", "again"))
    assert before["sources"] == after["sources"]
    assert before["encoders"] == after["encoders"]
    assert same(Predictor.from_pretrained(tmp_path / "again")(samples(home)), expected)


@pytest.mark.usefixtures("silent")
def test_probabilities_are_the_models_own_softmax_and_experts_its_highest_scores(home):
    model = fusion(home)
    collate = FusionCollator(tokenizer(home), processor(home))
    with torch.inference_mode():
        output = model(**collate([{**sample, "image": Image.open(sample["image"])} for sample in samples(home)]))
    predictions = list(Predictor(model.train(), collate)(samples(home)))
    assert model.training
    got = torch.tensor([prediction.probabilities for prediction in predictions])
    torch.testing.assert_close(got, output.logits.softmax(1), rtol=1e-4, atol=1e-5)
    assert [prediction.label for prediction in predictions] == output.logits.argmax(1).tolist()
    experts = torch.tensor([[index for index, _ in prediction.experts] for prediction in predictions])
    assert torch.equal(experts, output.scores.argmax(-1).t())
    scores = torch.tensor([[score for _, score in prediction.experts] for prediction in predictions])
    torch.testing.assert_close(scores, output.scores.amax(-1).t(), rtol=1e-4, atol=1e-5)


def test_order_and_batches_change_nothing_and_batches_run_when_they_are_asked_for(home, monkeypatch):
    made, inputs = predictor(home), samples(home) * 2
    expected = list(made(inputs))
    assert same(made(iter(inputs), batch_size=3), expected)
    assert same(made(inputs[::-1], batch_size=1), expected[::-1])
    taken = []
    lazy = made((taken.append(sample) or sample for sample in inputs), batch_size=2)
    assert taken == []
    next(lazy)
    assert len(taken) == 2


def test_images_are_paths_or_pil_images_shown_as_a_viewer_does(home, tmp_path):
    Image.new("RGBA", (20, 24)).save(tmp_path / "transparent.png")
    made = predictor(home)
    ways = [tmp_path / "transparent.png", str(tmp_path / "transparent.png"), Image.open(tmp_path / "transparent.png")]
    ways.append(Image.new("RGB", (20, 24), "white"))
    predictions = list(made([{"text": "red", "image": image} for image in ways]))
    assert same(predictions, predictions[:1] * 4)
    with pytest.raises(FileNotFoundError, match=r"the picture .*nowhere\.png"):
        next(made([{"text": "red", "image": str(tmp_path / "nowhere.png")}]))


@pytest.mark.usefixtures("silent")
def test_multi_label_gives_all_classes_above_a_half(home, tmp_path):
    predictor(home, fusion(home, problem_type="multi_label_classification")).save_pretrained(tmp_path)
    predictions = list(Predictor.from_pretrained(tmp_path)(samples(home)))
    for prediction in predictions:
        assert prediction.label == [name for name, value in prediction.probabilities.items() if value > 0.5]
    assert any(sum(prediction.probabilities.values()) > 1.01 for prediction in predictions)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_gives_numbers(home, tmp_path, outputs):
    model = loud(PromptTuned(bert(home), 2, outputs, problem_type="regression"))
    collate = FusionCollator(tokenizer(home), None, complementary_field=None)
    Predictor(model, collate).save_pretrained(tmp_path)
    predictions = list(Predictor.from_pretrained(tmp_path)(samples(home)))
    with torch.inference_mode():
        logits = model(**collate(samples(home))).logits
    values = [prediction.label for prediction in predictions]
    torch.testing.assert_close(torch.tensor(values), logits[:, 0] if outputs == 1 else logits, rtol=1e-4, atol=1e-5)
    assert {(prediction.probabilities, prediction.experts) for prediction in predictions} == {(None, None)}
    with pytest.raises(ValueError, match="trained for regression: leave them out"):
        Predictor(model, collate, ["a"] * outputs)


@pytest.mark.parametrize("return_logits", [False, True])
def test_a_model_that_can_not_be_folded_runs_as_it_is(return_logits):
    torch.manual_seed(1)
    encoder = louder(timm.create_model("vit_tiny_patch16_224", qk_norm=True, **VIT))
    config = MoPEConfig(**{**CONFIG.to_dict(), "cross_dim": 4})
    model = loud(MoPEFusion(encoder, None, 3, config, return_logits=return_logits))
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "blue", "white")]
    samples = [{"image": image, "feature": torch.randn(4)} for image in images]
    collate = FusionCollator(TimmTransform.of(encoder), None, main_field="image", complementary_field="feature")
    with pytest.raises(ValueError, match="fold"):
        model.fold()
    predictions = list(Predictor(model.train(), collate)(samples))
    assert model.training
    with torch.inference_mode():
        output = model.eval()(**collate(samples))
    logits = output if return_logits else output.logits
    torch.testing.assert_close(torch.tensor([p.probabilities for p in predictions]), logits.softmax(1))


# saves of the model alone, and older ones


@pytest.mark.parametrize("make", [fusion, lambda home: only_images(home).model])
def test_a_models_own_save_takes_its_librarys_preprocessing_and_says_so_once(home, tmp_path, make):
    model = make(home)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was saved by the model alone: inputs are made for the main encoder by") as seen:
        loaded = Predictor.from_pretrained(tmp_path, class_names=NAMES)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    expected = predictor(home, model) if isinstance(model, MoPEFusion) else only_images(home)
    expected = Predictor(model, expected.inputs, NAMES)
    assert same(loaded(samples(home)), expected(samples(home)))


@pytest.mark.usefixtures("silent")
def test_saves_without_sources_load_as_before_and_ask_for_their_encoders(home, tmp_path):
    made = predictor(home)
    made.save_pretrained(tmp_path)
    file = tmp_path / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    assert description["sources"].keys() == {"main", "complementary"}
    del description["sources"]
    file.write_text(json.dumps(description))
    MoPEFusion.from_pretrained(tmp_path, bert(home), vit(home), strict=True)
    with pytest.raises(
        ValueError,
        match=r"where to load its main encoder from, only that it is a BertModel whose layers have the widths \[16, 16\]",
    ):
        Predictor.from_pretrained(tmp_path)
    loaded = Predictor.from_pretrained(tmp_path, main=str(home / "bert"), complementary=vit(home))
    assert same(loaded(samples(home)), made(samples(home)))


@pytest.mark.usefixtures("silent")
def test_sources_that_differ_are_no_error_when_a_model_is_loaded(home, tmp_path):
    fusion(home).save_pretrained(tmp_path / "adapter")
    bert(home).save_pretrained(tmp_path / "bert")
    moved = transformers.BertModel.from_pretrained(tmp_path / "bert")
    MoPEFusion.from_pretrained(tmp_path / "adapter", moved, vit(home), strict=True)


def test_an_encoder_that_is_not_there_any_more_is_asked_for_with_all_that_is_known(home, tmp_path):
    bert(home).save_pretrained(tmp_path / "bert")
    model = loud(PromptTuned(transformers.BertModel.from_pretrained(tmp_path / "bert"), 2, 3))
    Predictor(model, FusionCollator(tokenizer(home), None, complementary_field=None)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "bert").rename(tmp_path / "elsewhere")
    message = (
        r"BertModel '.*/bert' of transformers, a bert whose layers .*, can't be loaded by .*: pass main=\.\.\., the encoder itself"
    )
    with pytest.raises(ValueError, match=message):
        Predictor.from_pretrained(tmp_path / "adapter")
    Predictor.from_pretrained(tmp_path / "adapter", main=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"main='timm/vit' is a name of a timm model, but the save needs BertModel"):
        Predictor.from_pretrained(tmp_path / "adapter", main="timm/vit")


def test_an_encoder_with_other_weights_under_its_name_is_refused(home, tmp_path):
    encoder = bert(home)
    with torch.no_grad():
        encoder.encoder.layer[0].attention.self.key.weight.add_(1)
    Predictor(PromptTuned(encoder, 2, 3), FusionCollator(tokenizer(home), None, complementary_field=None)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"other weights of 'main' .*: the saved encoder name now refers to other weights"):
        Predictor.from_pretrained(tmp_path)
    Predictor.from_pretrained(tmp_path, main=copy_of(encoder))
    with pytest.warns(UserWarning, match="was trained on other weights of 'main'"):
        Predictor.from_pretrained(tmp_path, main=bert(home))


def copy_of(encoder):
    other = transformers.BertModel(encoder.config)
    other.load_state_dict(encoder.state_dict())
    return other


def test_an_encoder_within_a_function_is_known_by_its_weights_too(home, tmp_path):
    made = frozen_function(home)
    with torch.no_grad():
        made.model.complementary.args[0].layers[0].attention.k_proj.weight.add_(1)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"other weights of 'complementary\.encoder'"):
        Predictor.from_pretrained(tmp_path)


@pytest.mark.usefixtures("silent")
def test_a_predictor_of_the_hub_is_read_by_its_name(home, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, commit = tmp_path / "models--user--colors", "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repository, **settings):
            return SimpleNamespace(repo_id=repository)

        def upload_folder(self, *, folder_path, delete_patterns, **settings):
            assert list(filter_repo_objects(["predictor-old/main/vocab.txt", "README.md"], allow_patterns=delete_patterns)) == [
                "predictor-old/main/vocab.txt"
            ]
            shutil.copytree(folder_path, folder / "snapshots" / commit)
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    made = predictor(home)
    assert made.push_to_hub("user/colors") == "https://hub/commit"
    loaded = Predictor.from_pretrained("user/colors", class_names=["rouge", "bleu", "vert"], device="cpu")
    french = dict(zip(NAMES, loaded.class_names, strict=True))
    assert [prediction.label for prediction in loaded(samples(home))] == [french[p.label] for p in made(samples(home))]


# what can't be saved


def first_letters(texts):
    return torch.tensor([[WORDS.index(word) if word in WORDS else 1 for word in text.split()[:1]] for text in texts])


@pytest.mark.usefixtures("silent")
def test_a_function_of_the_users_is_asked_for_by_name(home, tmp_path):
    made = Predictor(fusion(home), FusionCollator(first_letters, StackEach(functools.partial(pixels, 16))), NAMES)
    made.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"function for the main encoder, test_predictor\.first_letters, of which .* function, main_inputs=",
    ):
        Predictor.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"StackEach of partial of test_predictor\.pixels, of which .* function, complementary_inputs="
    ):
        Predictor.from_pretrained(tmp_path, main_inputs=first_letters)
    functions = {"main_inputs": first_letters, "complementary_inputs": StackEach(functools.partial(pixels, 16))}
    assert same(Predictor.from_pretrained(tmp_path, **functions)(samples(home)), made(samples(home)))


def pixels(size, image):
    return torch.tensor(list(image.resize((size, size)).tobytes())).view(size, size, 3).permute(2, 0, 1) / 255


class Brightness(torch.nn.Module):
    def forward(self, pixel_values):
        return pixel_values.flatten(1)[:, :4]


@pytest.mark.usefixtures("silent")
def test_a_complementary_side_of_the_users_is_asked_for_and_features_are_not(home, tmp_path):
    config = MoPEConfig(**{**CONFIG.to_dict(), "cross_dim": 4})
    own = Predictor(loud(MoPEFusion(bert(home), Brightness(), 3, config)), FusionCollator(tokenizer(home), processor(home)))
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"your own function or module, .*: pass complementary="):
        Predictor.from_pretrained(tmp_path / "own")
    assert same(Predictor.from_pretrained(tmp_path / "own", complementary=Brightness())(samples(home)), own(samples(home)))

    collate = FusionCollator(tokenizer(home), None, complementary_field="feature")
    plain = Predictor(loud(MoPEFusion(bert(home), None, 3, config)), collate)
    plain.save_pretrained(tmp_path / "plain")
    inputs = [{"text": text, "feature": torch.randn(4)} for text in TEXTS]
    assert same(Predictor.from_pretrained(tmp_path / "plain")(inputs), plain(inputs))


def test_a_head_of_ones_own_is_asked_for(home, tmp_path):
    head = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    model = loud(PromptTuned(bert(home), 2, head=head))
    made = Predictor(model, FusionCollator(tokenizer(home), None, complementary_field=None), NAMES)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a custom head, Sequential: pass head="):
        Predictor.from_pretrained(tmp_path)
    fresh = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    assert same(Predictor.from_pretrained(tmp_path, head=fresh)(samples(home)), made(samples(home)))


# kills and damage


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.BertTokenizerFast, "save_pretrained"),
        (transformers.ViTImageProcessor, "save_pretrained"),
        (predicting, "write_atomically"),
        (Path, "rename"),
        (MoPEFusion, "_save"),
        (checkpoint, "write_atomically"),
        (checkpoint.os, "replace"),
    ],
)
def test_a_kill_while_saving_leaves_the_old_predictor(home, tmp_path, monkeypatch, owner, name):
    old = predictor(home)
    old.save_pretrained(tmp_path)
    before, original = content(tmp_path), getattr(owner, name)

    def partly(*arguments, **settings):
        if name == "save_pretrained":
            original(*arguments, **settings)
        raise KeyboardInterrupt

    other = tokenizer(home)
    other.model_max_length = 5
    new = Predictor(fusion(home), FusionCollator(other, processor(home)), NAMES[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, partly)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    assert before.items() <= content(tmp_path).items()
    assert same(Predictor.from_pretrained(tmp_path)(samples(home)), old(samples(home)))
    new.save_pretrained(tmp_path)
    assert same(Predictor.from_pretrained(tmp_path)(samples(home)), new(samples(home)))


def test_a_model_saved_over_a_predictor_is_not_taken_for_it(home, tmp_path):
    predictor(home).save_pretrained(tmp_path)
    fusion(home).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was saved by the model alone"):
        assert Predictor.from_pretrained(tmp_path).class_names is None


@pytest.mark.parametrize("file", ["predictor.json", "main/tokenizer.json"])
def test_damaged_and_missing_files_are_named(home, tmp_path, file):
    predictor(home).save_pretrained(tmp_path)
    (found,) = tmp_path.glob(f"predictor-*/{file}")
    data = found.read_bytes()
    found.write_bytes(data[:-2])
    with pytest.raises(ValueError, match="is damaged"):
        Predictor.from_pretrained(tmp_path)
    found.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{Path(file).name} does not exist, .* copy the whole folder"):
        Predictor.from_pretrained(tmp_path)
    predictor(home).save_pretrained(tmp_path)  # mends it
    assert found.read_bytes() == data
    Predictor.from_pretrained(tmp_path)


def test_what_a_save_names_is_made_only_if_it_is_a_supported_encoder(home, tmp_path):
    source = source_of(bert(home))
    assert source["name"] == str(home / "bert")
    for change in ({"class": "os.system"}, {"class": "transformers.models.bert.modeling_bert.BertLMHeadModel"}, {"library": "os"}):
        with pytest.raises(ValueError, match=r"not a supported encoder: don't trust the file that names it"):
            load_source({**source, **change})
    source = source_of(timm_vit(home))
    for part in ({"settings": {"checkpoint_path": "x.pth"}}, {"overlay": {"hf_hub_filename": "x.pth"}}):
        with pytest.raises(ValueError, match=r"no save contains for an encoder: don't trust it"):
            load_source({**source, **part})
    with pytest.raises(ValueError, match="this doesn't describe where an encoder is"):
        load_source({**source, "settings": 3})


def test_a_part_of_a_checkpoint_is_got_out_of_the_whole(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(**sizes, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20)
    transformers.BartModel(config).save_pretrained(tmp_path / "whole")
    encoder = transformers.BartModel.from_pretrained(tmp_path / "whole").encoder
    encoder.save_pretrained(tmp_path / "part")
    for name in ("whole", "part"):
        again = load_source({**source_of(encoder), "name": str(tmp_path / name)})
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_encoders_without_a_name_have_no_source(home):
    assert source_of(transformers.BertModel(transformers.BertConfig(**SIZES))) is None
    assert source_of(timm.models.VisionTransformer(img_size=32, depth=1, embed_dim=12, num_heads=2)) is None
    assert source_of(timm.create_model("vit_tiny_patch16_224", norm_layer=torch.nn.LayerNorm, **VIT)) is None
    assert source_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_timm_encoder_that_was_changed_comes_back_as_it_was(tmp_path, name):
    made = {"img_size": 64, "num_classes": 0}
    made |= {"depths": (1, 1), "num_heads": (1, 1), "embed_dim": 8, "window_size": 4} if "swin" in name else VIT
    torch.manual_seed(0)
    encoder = louder(timm.create_model(name, **{**made, "global_pool": "avg"}))
    encoder.reset_classifier(0, "max")
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    encoder.pretrained_cfg["file"] = str(tmp_path / "weights.pth")
    encoder.bfloat16()
    again = load_source(json.loads(json.dumps(source_of(encoder))))
    assert source_of(again) == source_of(encoder)
    size = encoder.patch_embed.img_size
    images = torch.randn(2, 3, *size, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(encode(again, images), encode(encoder, images))


# wrong uses


def test_wrong_uses_are_refused_with_what_to_do(home, tmp_path):
    model, collate = fusion(home), FusionCollator(tokenizer(home), processor(home))
    one = FusionCollator(tokenizer(home), None, complementary_field=None)
    for arguments, error, message in (
        ((model.fold(), collate), TypeError, "model must be a MoPEFusion or a PromptTuned, got FoldedModel"),
        ((model, tokenizer(home)), TypeError, "inputs must be the FusionCollator"),
        ((model, one), ValueError, r"inputs of 2 sides: use FusionCollator\(main, complementary\)"),
        ((only_text(home).model, collate), ValueError, "inputs of 1 side: .*complementary_field=None"),
        ((model, collate, NAMES[:2]), ValueError, "class_names must have 3 names, one for each output of the head, got 2"),
        ((model, collate, "red"), TypeError, "class_names must be a list of strings"),
        ((model, collate, ["red", "red", "blue"]), ValueError, "class_names must differ from each other"),
        ((loud(PromptTuned(bert(home), 2)), one), ValueError, "has no head"),
    ):
        with pytest.raises(error, match=message):
            Predictor(*arguments)
    made = Predictor(model, collate)
    with pytest.raises(TypeError, match=r"samples must be a list of samples, got dict: give \[sample\] for one"):
        made(samples(home)[0])
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        made(samples(home), batch_size=0)
    made.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="main must be an encoder or the name of one, got int"):
        Predictor.from_pretrained(tmp_path, main=3)
    only_text(home).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PromptTuned, which has no complementary side"):
        Predictor.from_pretrained(tmp_path, complementary=vit(home))


def test_logits_that_are_not_finite_are_named(home):
    collate = FusionCollator(None, None, main_field="pixels", complementary_field=None)
    made = Predictor(loud(PromptTuned(vit(home), 2, 3)), collate)
    inputs = [{"pixels": torch.full((3, 16, 16), value)} for value in (0.0, 1.0, float("nan"))]
    with pytest.raises(ValueError, match=r"NaN or infinite logits, first for sample 2 \(from 0\)"):
        list(made(inputs, batch_size=2))


# the program


@pytest.fixture
def data(home, tmp_path):
    """A file of lines beside its images, and what a predictor says of it."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes((home / f"{i}.png").read_bytes())
    lines = [{"id": i, "text": text, "img": f"images/{i}.png", "label": ["any", None, 3, {}][i]} for i, text in enumerate(TEXTS)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"


def run(*arguments):
    predict.main([str(argument) for argument in arguments])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("make", [fused_text_and_image, only_text, only_images])
def test_the_program_writes_what_the_predictor_says(home, tmp_path, data, make, capsys):
    made = make(home)
    made.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "adapter", data, "-o", tmp_path / "out.jsonl", "--batch-size", 3)
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == ["0", "1", "2", "3"]
    for row, expected in zip(rows(tmp_path / "out.jsonl"), made(samples(home)), strict=True):
        assert row["label"] == expected.label
        assert row["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        experts = expected.experts and [[index, pytest.approx(score, abs=1e-5)] for index, score in expected.experts]
        assert row["experts"] == experts
    out, err = capsys.readouterr()
    assert out.endswith("out.jsonl: 4 samples\n")
    assert "4/4" in err
    assert not any("\r" in line for line in err.split("\n") if "predicting" in line)


def test_of_one_side_the_other_field_may_be_anything(home, tmp_path):
    only_text(home).save_pretrained(tmp_path / "text")
    (tmp_path / "text.jsonl").write_text('{"id": 1, "text": "red", "img": 7}\n{"id": 2, "text": "blue"}')
    run(tmp_path / "text", tmp_path / "text.jsonl", "-o", tmp_path / "out.jsonl")
    assert len(rows(tmp_path / "out.jsonl")) == 2
    only_images(home).save_pretrained(tmp_path / "images")
    (home / "images.jsonl").write_text('{"id": 1, "img": "0.png"}\n{"id": 2, "img": "1.png", "text": null}')
    run(tmp_path / "images", home / "images.jsonl", "-o", tmp_path / "out.jsonl")
    assert len(rows(tmp_path / "out.jsonl")) == 2


def test_missing_images_are_told_left_out_or_grey(home, tmp_path, data, capsys):
    predictor(home).save_pretrained(tmp_path / "adapter")
    (data.parent / "images" / "1.png").unlink()
    arguments = (tmp_path / "adapter", data, "-o", tmp_path / "out.jsonl")
    with pytest.raises(SystemExit, match=r"1 problem in .*data\.jsonl:\nline 2: field \"img\": .*1\.png does not exist"):
        run(*arguments)
    assert not (tmp_path / "out.jsonl").exists()
    run(*arguments, "--missing-images", "skip")
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == ["0", "2", "3"]
    assert "1 samples are left out: no image" in capsys.readouterr().out
    run(*arguments, "--missing-images", "grey")
    assert len(rows(tmp_path / "out.jsonl")) == 4


def test_all_that_is_wrong_with_a_file_comes_at_once(home, tmp_path, data):
    predictor(home).save_pretrained(tmp_path / "adapter")
    data.write_text('{"id": 1, "text": 5, "img": "images/0.png"}\n{"id": 2}\nno json')
    with pytest.raises(SystemExit) as refused:
        run(tmp_path / "adapter", data, "-o", tmp_path / "out.jsonl")
    message = str(refused.value)
    assert message.startswith(f"ValueError: 3 problems in {data}:")
    assert all(part in message for part in ('line 1: field "text"', "line 2: lacks 'text'", "line 3: not JSON"))


def test_a_program_that_is_stopped_leaves_the_old_predictions(home, tmp_path, data):
    predictor(home).save_pretrained(tmp_path / "adapter")
    (tmp_path / "out.jsonl").write_text("old")
    (data.parent / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"OSError: the image of post 3 can't be read"):
        run(tmp_path / "adapter", data, "-o", tmp_path / "out.jsonl", "--batch-size", 1)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert not list(tmp_path.glob(".out*"))


def test_functions_give_encoders_that_have_no_name(home, tmp_path, data, monkeypatch):
    made = Predictor(
        loud(MoPEFusion(bert(home), Brightness(), 3, MoPEConfig(**{**CONFIG.to_dict(), "cross_dim": 4}))),
        FusionCollator(first_letters, processor(home)),
    )
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "of_mine.py").write_text(
        f"import test_predictor as t\nmain = lambda: (t.bert(t.Path({str(home)!r})), t.first_letters)\nother = t.Brightness\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = (tmp_path / "adapter", data, "-o", tmp_path / "out.jsonl")
    run(*arguments, "--main", "of_mine:main", "--complementary", "of_mine:other")
    assert [row["label"] for row in rows(tmp_path / "out.jsonl")] == [prediction.label for prediction in made(samples(home))]
    for name, message in (("of_mine:nothing", "has no attribute 'nothing'"), ("nothing:main", "No module named 'nothing'")):
        with pytest.raises(SystemExit, match=rf"ValueError: {name} can't be imported \(.*{message}"):
            run(*arguments, "--main", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--device", "abacus"], "--device abacus can't be used"),
        (["-o", "{data}"], "--output would replace the data"),
        (["-o", "nowhere/out.jsonl"], "--output must be a file in an existing folder"),
    ],
)
def test_wrong_arguments_end_with_a_line(home, tmp_path, data, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(tmp_path, data, "-o", tmp_path / "out.jsonl", *(argument.format(data=data) for argument in arguments))
    assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match=r"^FileNotFoundError: .*mope_fast\.json does not exist"):
        run(tmp_path, data, "-o", tmp_path / "out.jsonl")


def several(home):
    """Text with a picture and a video, each of which may be missing."""
    sides = {"picture": Side(vit(home), optional=True), "video": Side(timm_vit(home), optional=True, frames="mean")}
    model = MoPEFusion(bert(home), sides, len(NAMES), CONFIG).eval()
    torch.nn.init.normal_(model.head.weight)
    preprocess = {"picture": processor(home), "video": EachFrame(TimmTransform.of(model.complementary.sides["video"].main.encoder))}
    collate = FusionCollator(tokenizer(home), preprocess)
    videos = [[home / f"{t}.png" for t in range(i + 1)] for i in range(len(TEXTS))]
    samples = [{"text": text, "picture": home / f"{i}.png", "video": videos[i]} for i, text in enumerate(TEXTS)]
    samples[1]["picture"] = samples[2]["video"] = None
    return model, collate, samples


def test_several_sides_are_found_by_the_names_in_the_save(home, tmp_path):
    model, collate, samples = several(home)
    predictor = Predictor(model, collate, NAMES)
    expected = list(predictor(samples))
    opened = [
        {**s, "picture": s["picture"] and Image.open(s["picture"]), "video": s["video"] and [Image.open(p) for p in s["video"]]}
        for s in samples
    ]
    with torch.no_grad():
        logits = model(**collate(opened)).logits
    assert [NAMES[i] for i in logits.argmax(1)] == [each.label for each in expected]
    lacking = [{name: value for name, value in sample.items() if value is not None} for sample in samples]
    assert list(predictor(lacking)) == expected
    predictor.save_pretrained(tmp_path)
    again = list(Predictor.from_pretrained(tmp_path)(samples))
    for got, wanted in zip(again, expected, strict=True):
        assert got.probabilities == pytest.approx(wanted.probabilities, abs=1e-5)
    # without the model's preprocessing, by what the encoders' libraries have
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    with pytest.warns(UserWarning, match=r"for the complementary\.video encoder by timm's transform .* from the field 'frames'"):
        bare = Predictor.from_pretrained(alone)
    assert bare.inputs.sides["complementary_inputs.picture"][0] == "image"
    given = Predictor.from_pretrained(tmp_path, complementary={"picture": vit(home)})
    assert next(given(samples)).probabilities == pytest.approx(expected[0].probabilities, abs=1e-5)
    with pytest.raises(ValueError, match=r"of some of the sides \['picture', 'video'\], got \['sound'\]"):
        Predictor.from_pretrained(tmp_path, complementary={"sound": vit(home)})
    with pytest.raises(ValueError, match=r"use FusionCollator\(main, {'picture': ..., 'video': ...}\)"):
        Predictor(model, FusionCollator(tokenizer(home), processor(home)))


def test_the_program_reads_several_sides(home, tmp_path):
    model, collate, samples = several(home)
    expected = list(Predictor(model, collate, NAMES)(samples))
    preprocess = {name.partition(".")[2]: made for name, (_, made) in collate.sides.items() if "." in name}
    collate = FusionCollator(tokenizer(home), preprocess, complementary_field={"picture": "image", "video": "frames"})
    Predictor(model, collate, NAMES).save_pretrained(tmp_path / "adapter")
    data, output = home / "several.jsonl", tmp_path / "out.jsonl"
    with open(data, "w") as file:
        for i, sample in enumerate(samples):
            picture, video = sample["picture"], sample["video"]
            row = {"id": i, "text": sample["text"], "img": picture and picture.name, "frames": video and [p.name for p in video]}
            file.write(json.dumps(row) + "\n")
    run(tmp_path / "adapter", data, "-o", output)
    found = rows(output)
    for got, wanted in zip(found, expected, strict=True):
        assert got["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
    run(tmp_path / "adapter", data, "-o", output, "--complementary", f"picture={home / 'vit'}")
    assert rows(output) == found
    for given, message in (
        (["picture=a", "b"], "give SIDE=NAME for all of them"),
        (["a", "b"], "give one name, or SIDE=NAME for each"),
        (["sound=a"], r"of some of the sides \['picture', 'video'\], got \['sound'\]"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "adapter", data, "-o", output, "--complementary", *given)

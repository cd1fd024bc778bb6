"""KeyboardInterrupt at a random moment: by signal, in another thread, or at one of those at which CPython looks for signals.

Each use is a generator: it gives what is to be interrupted, and then checks that everything works.
"""

import copy
import ctypes
import functools
import pickle
import signal
import threading
import time

import numpy as np
import tiny_timm
import torch
from at_the_same_time import in_threads
from interrupts import interrupt
from judge import REFUSED, RIGHT, Contact, Refusal, judge, kept_folder, same
from models import DETERMINISTIC, gradients, make_cross, served, text_fusion
from PIL import Image, ImageFile
from tiny_fusion import make_bert, make_dinov2, make_fusion, make_images, make_text

import mope_fast
from mope_fast import MoPEFusion, PromptedEncoder, unwrap_encoder
from mope_fast.data import FeatureCache, load_image


def run(contact: Contact) -> str:
    use = contact.choose(USES)
    events, seconds = measured(use)
    way = contact.choose((interrupt, interrupt, by_clock, in_thread))
    contact.note(use.__name__, way.__name__)
    steps = use(contact)
    function = next(steps)
    if way is interrupt:
        event = contact.random.randint(1, events)
        contact.note(f"event {event} of {events}")
        interrupted = interrupt(function, event) >= event
    else:
        interrupted = way(function, contact.random.uniform(0, seconds))
    contact.note(f"{interrupted=}")
    next(steps, None)
    return REFUSED if interrupted else RIGHT


@functools.cache
def measured(use) -> tuple[int, float]:
    """Moments, and seconds, that a use takes."""
    with torch.random.fork_rng():
        for _ in range(2):  # the first one warms up
            steps = use(Contact(0, "interrupts", -1, kept_folder()))
            function, start = next(steps), time.perf_counter()
            events = interrupt(function, 0)
            seconds = time.perf_counter() - start
            next(steps, None)
    return max(1, events), seconds


def by_clock(function, seconds: float) -> bool:
    """A signal, after so much time of the processor."""
    armed = True

    def handler(*args):
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGVTALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, max(seconds, 1e-6))
        function()
        armed, was = False, armed
        return not was
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def in_thread(function, seconds: float) -> bool:
    """A server's or a notebook's thread that is ended from outside."""
    begun, done = threading.Event(), []

    def work():
        try:
            begun.set()
            function()
            done.append(True)
        except KeyboardInterrupt:
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    begun.wait(60)
    time.sleep(seconds)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    thread.join(60)
    assert not thread.is_alive(), "the thread waits for ever"
    return not done


def public_state(encoder):
    """All that wrapping changes for a while."""
    modules, config = list(encoder.modules()), getattr(encoder, "config", None)
    flags = [p.requires_grad for p in encoder.parameters()], [m.training for m in modules]
    return *flags, modules, [set(vars(m)) for m in modules], id(config), getattr(config, "_attn_implementation", None)


def works(name: str) -> None:
    """In this thread and in another one."""
    model, requests, expected = served(name)
    same(model(*requests[0]).logits, expected[0])
    (other,) = in_threads(lambda: model(*requests[1]).logits)
    same(other, expected[1])


def forward(contact: Contact):
    name = contact.choose(("text", "pair", "vit", "swin", "folded", "tuned", "cached"))
    contact.note(name)
    model, requests, _ = served(name)
    yield lambda: model(*requests[1])
    works(name)


def beside(contact: Contact):
    """While another thread runs the model too."""
    name = contact.choose(("text", "pair", "vit", "tuned"))
    contact.note(name)
    model, requests, expected = served(name)
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: others.extend(model(*requests[2]).logits for _ in range(3)), daemon=True)
    thread.start()
    yield lambda: model(*requests[1])
    thread.join(60)
    assert not thread.is_alive(), "the other thread waits for ever"
    same(others, [expected[2]] * 3)
    works(name)


def backward(contact: Contact):
    model, requests, _ = served("text")
    checkpointing = contact.chance(0.7)
    expected = gradients(model, requests[0])
    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        yield lambda: gradients(model, requests[1])
        works("text")
        same(gradients(model, requests[0]), expected)
    finally:
        model.gradient_checkpointing_disable()


def an_encoder(contact: Contact):
    """In training mode, with inputs for it."""
    kind = contact.choose(("bert", "dinov2", "vit", "swin"))
    contact.note(kind)
    if kind == "bert":
        encoder, inputs = make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), make_text(2)
    elif kind == "dinov2":
        encoder, inputs = make_dinov2(), {"pixel_values": make_images(2)}
    else:
        encoder, inputs = tiny_timm.make_encoder(kind, drop_path_rate=0.0), {"x": tiny_timm.make_images(2, kind, {})}
    encoder.train().requires_grad_(contact.chance(0.5))
    next(encoder.children()).requires_grad_(contact.chance(0.5)).train(contact.chance(0.5))
    return encoder, inputs


def alone(encoder, inputs) -> torch.Tensor:
    with torch.no_grad():
        output = encoder(**inputs)
    return getattr(output, "last_hidden_state", output)


def wrap(contact: Contact):
    encoder, inputs = an_encoder(contact)
    state, before = public_state(encoder), alone(encoder, inputs)
    if contact.chance(0.3):  # one that was dropped is taken over on the way
        dropped = make_fusion(encoder, None, **DETERMINISTIC)
        del dropped
    yield lambda: MoPEFusion(encoder, None, 3, text_fusion().config) if contact.chance(0.5) else PromptedEncoder(encoder)
    model = make_fusion(encoder, None, **DETERMINISTIC)
    model(inputs, make_cross(2))
    model.unwrap()
    assert public_state(encoder) == state, "the encoder was not given back"
    same(alone(encoder, inputs), before)


def unwrap(contact: Contact):
    encoder, inputs = an_encoder(contact)
    state, before = public_state(encoder), alone(encoder, inputs)
    model, cross = make_fusion(encoder, None, **DETERMINISTIC), make_cross(2)
    expected, trained = model(inputs, cross).logits, model.trained_state_dict()
    yield model.unwrap if contact.chance(0.7) else lambda: unwrap_encoder(encoder)
    judge(
        lambda: model(inputs, cross).logits,
        lambda logits: same(logits, expected),
        Refusal((RuntimeError,), ("unwrapped", "took their prompts")),
    )
    if contact.chance(0.5):
        model.unwrap()
    else:
        unwrap_encoder(encoder)
    assert public_state(encoder) == state, "the encoder was not given back"
    same(alone(encoder, inputs), before)
    again = make_fusion(encoder, None, **DETERMINISTIC)
    again.load_state_dict(trained, strict=False)
    same(again(inputs, cross).logits, expected)


def copies(contact: Contact):
    name = contact.choose(("text", "pair", "vit", "swin"))
    model, requests, expected = served(name)
    copied = copy.deepcopy if contact.chance(0.5) else lambda it: pickle.loads(pickle.dumps(it))
    yield lambda: copied(model)
    works(name)
    same(copied(model)(*requests[0]).logits, expected[0])


def fold(contact: Contact):
    name = contact.choose(("text", "pair", "vit", "swin"))
    model, requests, expected = served(name)
    yield lambda: model.fold()
    works(name)
    same(model.fold()(*requests[0]).logits, expected[0], 1e-9)


def save(contact: Contact):
    folder = contact.folder / "save"
    model = copy.deepcopy(text_fusion())
    old = None
    if contact.chance(0.7):
        model.save_pretrained(folder)
        old = model.trained_state_dict()
        old = {name: value.clone() for name, value in old.items()}
    with torch.no_grad():
        model.head.bias.add_(1)
    new = {name: value.clone() for name, value in model.trained_state_dict().items()}
    yield lambda: model.save_pretrained(folder)
    if old is not None or (folder / "mope_fast.json").exists():
        model.load_pretrained(folder, strict=True)
        got = model.trained_state_dict()
        assert old is None or torch.equal(got["head.bias"], old["head.bias"]) or torch.equal(got["head.bias"], new["head.bias"])
        same({k: v for k, v in got.items() if k != "head.bias"}, {k: v for k, v in new.items() if k != "head.bias"}, 0)
    model.load_state_dict(new, strict=False)
    model.save_pretrained(folder)
    with torch.no_grad():
        model.head.bias.zero_()
    model.load_pretrained(folder, strict=True)
    same(model.trained_state_dict(), new, 0)


def load(contact: Contact):
    folder = contact.folder / "save"
    model, requests, expected = served("text")
    model.save_pretrained(folder)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    encoder = make_bert() if contact.chance(0.5) else None
    if encoder is not None:
        encoder.load_state_dict(model.main.encoder.state_dict())
        state = public_state(encoder)
        yield lambda: MoPEFusion.from_pretrained(folder, encoder)
        again = MoPEFusion.from_pretrained(folder, encoder, strict=True).double()
        same(again(*requests[0]).logits, expected[0])
        again.unwrap()
        assert public_state(encoder) == state
    else:
        yield lambda: model.load_pretrained(folder)
        model.load_pretrained(folder, strict=True)
        same(model(*requests[0]).logits, expected[0])


def cache(contact: Contact):
    folder = contact.folder / "features"
    encoder = make_dinov2().train()
    state, images = public_state(encoder), make_images(4)
    expected = mope_fast.encoders.encode(encoder.eval(), images).detach()
    encoder.train()
    features = FeatureCache(folder, encoder)
    features(images[:2])

    def use():
        features(images[1:])
        features.flush()
        return FeatureCache(folder, encoder)(images)

    yield use
    order = [3, 0, 2, 1]
    same(features(images[order]), expected[order])
    assert public_state(encoder) == state, "the encoder's mode was not given back"
    features.flush()
    again = FeatureCache(folder, encoder)
    assert len(again) == 4
    again.encoder.register_forward_hook(lambda *args: 1 / 0)
    same(again(images), expected)


def training_step(contact: Contact):
    model = copy.deepcopy(text_fusion()).train()
    before = copy.deepcopy(model.state_dict())
    request, labels = (make_text(3), make_cross(3)), torch.tensor([0, 2, 1])

    def step():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(*request, labels).loss.backward()
        optimizer.step()

    step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    model.zero_grad()
    yield step
    for name, value in model.named_buffers():
        if name not in before:  # not a part of a save
            continue
        assert any(torch.allclose(value, state[name], rtol=1e-12, atol=1e-12) for state in (before, after)), name
    model.load_state_dict(before)
    model.zero_grad()
    step()
    same(model.state_dict(), after)


def pictures(contact: Contact):
    folder = contact.folder
    path, cut = folder / "a.png", folder / "cut.jpg"
    pixels = torch.randint(256, (40, 30, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(path)
    Image.fromarray(pixels).save(cut, quality=95)
    cut.write_bytes(cut.read_bytes()[:1500])
    switch = contact.chance(0.5)
    ImageFile.LOAD_TRUNCATED_IMAGES = switch
    try:
        yield lambda: load_image(path)
        assert np.array_equal(np.asarray(load_image(path)), pixels)
        judge(lambda: load_image(cut), None, Refusal((OSError,), (str(cut),)))
        load_image(path)
        assert switch == ImageFile.LOAD_TRUNCATED_IMAGES, "Pillow's switch was not given back"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


USES = (forward, forward, beside, backward, wrap, unwrap, copies, fold, save, load, cache, training_step, pictures)

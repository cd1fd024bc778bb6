"""Several threads on one model, on several models of one encoder, on one encoder: what each gets is what it gets alone."""

import copy
import functools
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import tiny_timm
import torch
from at_the_same_time import in_threads
from contact_interrupts import alone, public_state
from judge import REFUSED, RIGHT, Contact, Refusal, WrongError, judge, same
from models import DETERMINISTIC, NAMES, ON_ONE_ENCODER, a_model, gradients, make_cross, served
from tiny_fusion import make_bert, make_dinov2, make_fusion, make_images, make_text
from torch import nn

from mope_fast import FeatureCache, MoPEFusion, PromptTuned, encoders

FAILING: set[int] = set()
"""Threads in which a hook fails."""
UNWRAPPED = Refusal((RuntimeError,), ("this model was unwrapped",))


def run(contact: Contact) -> str:
    use = contact.random.choices((together, given_back, wrapped_twice, cached), (14, 3, 2, 2))[0]
    contact.note(use.__name__)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10 ** contact.random.uniform(-6, -2.3))
    try:
        return use(contact)
    finally:
        sys.setswitchinterval(interval)


class Job(NamedTuple):
    """What a thread does, and how it is judged."""

    what: str
    use: Callable[[], Any]
    right: Callable[[Any], None] | None
    refusal: Refusal | None = None


def verdict_of(jobs: list[Job]) -> str:
    """Of jobs at the same time, each in a thread; refused if one was."""
    results = in_threads(*(functools.partial(outcome, job) for job in jobs))
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, BaseException):
            raise WrongError(f"{job.what}: {result}") from result
    return REFUSED if REFUSED in results else RIGHT


def outcome(job: Job) -> str:
    return judge(job.use, job.right, job.refusal)


def together(contact: Contact) -> str:
    """Models that are shared by all contacts."""
    names = contact.choose((NAMES, ON_ONE_ENCODER, ON_ONE_ENCODER, [contact.choose(NAMES)]))
    names = [contact.choose(names) for _ in range(contact.random.randint(2, 4))]
    models = {name: a_model(name) for name in names}
    for name in names:
        served(name), wanted_gradients(name)
    checkpointing = contact.chance(0.4)
    hooks = []
    for model in {id(model): model for model in models.values()}.values():
        if checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable()
        parts = parts_of(model.main.encoder)
        for part in [parts[0], *contact.random.sample(parts, min(len(parts), contact.random.randint(1, 4)))]:
            hooks.append(part.register_forward_pre_hook(functools.partial(pause, random.Random(contact.index))))
    jobs = [a_job(contact, name) for name in names]
    contact.note(f"{checkpointing=}", [job.what for job in jobs])
    try:
        verdict = verdict_of(jobs)
    finally:
        for hook in hooks:
            hook.remove()
        for model in models.values():
            if hasattr(model, "gradient_checkpointing_disable"):
                model.gradient_checkpointing_disable()
    for name, model in models.items():
        _, requests, expected = served(name)
        same(model(*requests[0]).logits, expected[0])
    return verdict


def parts_of(encoder: nn.Module) -> list[nn.Module]:
    """Those that may have hooks: timm's window attention is not called by prompted layers, which is refused by name."""
    return [part for part in encoder.modules() if type(part).__name__ != "WindowAttention"]


def pause(numbers: random.Random, *args: Any) -> None:
    if threading.get_ident() in FAILING:
        raise ArithmeticError("planted")
    if numbers.random() < 0.3:
        time.sleep(numbers.random() * 2e-3)


@functools.cache
def wanted_gradients(name: str) -> list[list[torch.Tensor]] | None:
    model, requests, _ = served(name)
    if not any(p.requires_grad for p in model.parameters()):
        return None
    return [gradients(model, request) for request in requests]


def a_job(contact: Contact, name: str) -> Job:
    model, requests, expected = served(name)
    index = contact.random.randrange(len(requests))
    request, logits = requests[index], expected[index]
    rare = ("copied", "pickled", "state", "saved", "wrong inputs", "a hook fails", "wrapped again")
    kind = contact.choose(("forward",) * 8 + ("gradients",) * 4 + ("alone",) * 2 + rare)
    if kind in ("gradients", "saved") and wanted_gradients(name) is None:
        kind = "forward"
    times = contact.random.randint(1, 3)
    is_logits = functools.partial(same, expected=[logits] * times)
    if kind == "forward":
        mode = contact.choose((torch.no_grad, torch.inference_mode, nullcontext))

        def forward():
            with mode():
                return [model(*request).logits.clone() for _ in range(times)]

        return Job(f"{name}: forward", forward, is_logits)
    if kind == "alone":
        encoder, inputs = model.main.encoder, request[0]
        inputs = inputs if isinstance(inputs, dict) else {"x": inputs}
        return Job(
            f"{name}: the encoder alone", lambda: alone(encoder, inputs), functools.partial(same, expected=alone(encoder, inputs))
        )
    if kind == "gradients":
        wanted = wanted_gradients(name)[index]
        return Job(f"{name}: gradients", lambda: gradients(model, request), functools.partial(same, expected=wanted))
    if kind in ("copied", "pickled"):
        make = copy.deepcopy if kind == "copied" else lambda it: pickle.loads(pickle.dumps(it))
        return Job(f"{name}: {kind}", lambda: [make(model)(*request).logits], functools.partial(same, expected=[logits]))
    if kind == "state":
        before = {key: value.clone() for key, value in model.state_dict().items()}
        return Job(f"{name}: state_dict", model.state_dict, functools.partial(same, expected=before, tolerance=0))
    if kind == "saved":
        folder, before = contact.folder / f"{name}-{contact.random.random()}", model.trained_state_dict()

        def save():
            model.save_pretrained(folder)
            twin = copy.deepcopy(model)
            twin.load_pretrained(folder, strict=True)
            return twin.trained_state_dict()

        return Job(f"{name}: saved and loaded", save, functools.partial(same, expected=before, tolerance=0))
    if kind == "wrong inputs":
        return Job(f"{name}: {kind}", lambda: model("text", *request[1:]), None, Refusal((TypeError, ValueError), ("inputs",)))
    if kind == "wrapped again":
        encoder = model.main.encoder
        return Job(f"{name}: {kind}", lambda: PromptTuned(encoder, 2), None, Refusal((ValueError,), ("already takes prompts",)))

    def fail():
        FAILING.add(threading.get_ident())
        try:
            return model(*request)
        finally:
            FAILING.remove(threading.get_ident())

    return Job(f"{name}: {kind}", fail, None, Refusal((ArithmeticError,), ("planted",)))


def a_fresh_encoder(contact: Contact) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """In training mode, with dropout in it."""
    kind = contact.choose(("bert", "bert", "dinov2", "vit", "swin"))
    contact.note(kind)
    if kind == "bert":
        return make_bert(hidden_dropout_prob=0.5).train(), make_text(2)
    if kind == "dinov2":
        return make_dinov2(hidden_dropout_prob=0.5).train(), {"pixel_values": make_images(2)}
    return tiny_timm.make_encoder(kind, drop_path_rate=0.5).train(), {"x": tiny_timm.make_images(2, kind, {})}


@contextmanager
def pauses(contact: Contact, encoder: nn.Module, seconds: float = 3e-3):
    numbers, parts = random.Random(contact.index), parts_of(encoder)
    hooks = [
        part.register_forward_pre_hook(lambda *args: time.sleep(numbers.random() * seconds))
        for part in contact.random.sample(parts, min(len(parts), 4))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def given_back(contact: Contact) -> str:
    """A model that is unwrapped while threads run it."""
    encoder, inputs = a_fresh_encoder(contact)
    state, before = public_state(encoder), alone(encoder.eval(), inputs)
    encoder.train()
    model, cross = make_fusion(encoder, None, **DETERMINISTIC), make_cross(2)
    expected, trained = model(inputs, cross).logits.detach(), model.trained_state_dict()
    right = functools.partial(same, expected=expected)

    def take_back():
        time.sleep(delay)
        return model.unwrap()[0]

    delay = contact.random.random() * 5e-3
    jobs = [
        Job("forward", lambda: model(inputs, cross).logits.detach(), right, UNWRAPPED) for _ in range(contact.random.randint(1, 3))
    ]
    with pauses(contact, encoder):
        verdict = verdict_of([*jobs, Job("unwrap", take_back, lambda got: None)])
    assert public_state(encoder) == state, "the encoder was not given back"
    same(alone(encoder.eval(), inputs), before)
    again = make_fusion(encoder, None, **DETERMINISTIC)
    again.load_state_dict(trained, strict=False)
    same(again(inputs, cross).logits, expected)
    return verdict


def wrapped_twice(contact: Contact) -> str:
    """Threads that each make a model on one encoder: one has it, the others are told so."""
    encoder, inputs = a_fresh_encoder(contact)
    state, cross = public_state(encoder), make_cross(2)
    first = make_fusion(encoder, None, **DETERMINISTIC)
    expected, trained = first(inputs, cross).logits.detach(), first.trained_state_dict()
    first.unwrap()
    if contact.chance(0.3):
        dropped = make_fusion(encoder, None, **DETERMINISTIC)
        del dropped

    def make():
        return MoPEFusion(encoder, None, first.head.out_features, first.config).double().eval()

    count = contact.random.randint(2, 4)
    made = []
    jobs = [Job("wrap", make, made.append, Refusal((ValueError,), ("already takes prompts",))) for _ in range(count)]
    verdict_of(jobs)
    assert len(made) == 1, f"{len(made)} of {count} threads have the encoder"
    made[0].load_state_dict(trained, strict=False)
    same(made[0](inputs, cross).logits, expected)
    made[0].unwrap()
    assert public_state(encoder) == state, "the encoder was not given back"
    return REFUSED


@functools.cache
def image_encoder() -> nn.Module:
    return make_dinov2(hidden_dropout_prob=0.5).train()


def cached(contact: Contact) -> str:
    """One feature cache, or several of one folder, for all threads."""
    encoder = image_encoder()
    images = make_images(6)
    features = encoders.encode(encoder.eval(), images).detach()
    encoder.train()
    caches = [
        FeatureCache(contact.folder, encoder, flush_every=contact.random.randint(1, 8)) for _ in range(contact.random.randint(1, 2))
    ]
    jobs = []
    for _ in range(contact.random.randint(2, 5)):
        cache = contact.choose(caches)
        rows = torch.randint(6, (contact.random.randint(1, 5),))
        use = functools.partial(cache, images[rows])
        jobs.append(Job(f"features of {rows.tolist()}", use, functools.partial(same, expected=features[rows])))
    jobs.append(Job("flush", contact.choose(caches).flush, lambda got: None))
    with pauses(contact, encoder, 1e-3):
        verdict = verdict_of(jobs)
    assert all(part.training for part in encoder.modules()), "the encoder's mode was not given back"
    for cache in caches:
        cache.flush()
        same(cache(images), features)
    same(FeatureCache(contact.folder, encoder)(images), features)
    return verdict

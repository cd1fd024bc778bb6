"""Tiny random encoders of transformers in folders, as ``--text-model`` and its like take them."""

from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "of", "plot", "longest", "women", "work", "best", "apple", "pie"]


def write_encoders(folder: Path) -> dict[str, str]:
    """Argument of the programs -> folder of an encoder of a few thousand parameters with what makes its inputs."""
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizerFast,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )  # fmt: skip

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(3)
    BertModel(BertConfig(**sizes, vocab_size=len(WORDS))).save_pretrained(folder / "text")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "text")
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "image")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "image")
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}
    wav2vec2 = Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    Wav2Vec2Model(wav2vec2).save_pretrained(folder / "audio")
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder / "audio")
    return {
        "--text-model": str(folder / "text"), "--image-model": str(folder / "image"), "--video-model": str(folder / "image"),
        "--audio-model": str(folder / "audio"),
    }  # fmt: skip

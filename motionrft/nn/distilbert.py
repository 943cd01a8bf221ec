"""DistilBERT: captions in, the states of all their tokens out."""

from __future__ import annotations

from pathlib import Path

from motionrft.core.errors import ConfigError, explain
from motionrft.nn.frozen import FrozenEncoder
from motionrft.nn.pretrained import AGAIN, config_of, load_model, load_tokenizer, weight_files
from motionrft.nn.sentence_folder import fingerprint_of


class DistilBert(FrozenEncoder):
    """Last hidden states of DistilBERT (distilbert-base-uncased: 768), float32, which MDM's decoder variant reads.

    Tokens include [CLS] and [SEP]. Longer captions than the model has positions for (512) are cut and keep their
    [SEP]. The sentence vector is the plain mean over the tokens; nothing published reads it.

    Args:
        folder: model folder in the Hugging Face layout; heads that lie in it are left out.
        batch_size: captions per forward; captions are sorted by length so that little padding is computed.

    Raises:
        ConfigError: a file is missing, or the folder describes another kind of model.
        CheckpointError: weights are damaged, incomplete, of other sizes, or not plain tensors.
    """

    def __init__(self, folder: Path, batch_size: int = 64) -> None:
        folder = Path(folder)
        from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizer

        config = config_of(folder, {"distilbert": DistilBertConfig}, "DistilBERT")
        weights = weight_files(folder)
        self._tokenizer, files = load_tokenizer(folder, config.vocab_size, DistilBertTokenizer, ("vocab.txt",))
        frame = self._tokenizer("")["input_ids"]
        if len(frame) != 2:
            expected = "a tokenizer that puts captions between [CLS] and [SEP]"
            raise ConfigError(explain(expected, f"{frame} around nothing", str(files[0]), AGAIN))
        self._model = load_model(DistilBertModel, folder, weights)
        self._batch_size, self.max_tokens = batch_size, int(config.max_position_embeddings)
        self.dim = self.pooled_dim = int(config.dim)
        self.fingerprint = fingerprint_of(
            {"kind": "distilbert", "pool": "mean", "max_tokens": self.max_tokens},
            [folder / "config.json", *files, *weights],
        )

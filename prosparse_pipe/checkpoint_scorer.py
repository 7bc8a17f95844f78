"""A checkpoint as `prosparse-pipe eval` scores it, in torch: the other kind of `scoring.Scorer` beside `GGUFScorer`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from prosparse_pipe.profile import DTYPES
from prosparse_pipe.relu import RELU_NAMES, config_activation, load_model, load_sparse_model, read_config
from prosparse_pipe.scoring import ROWS
from prosparse_pipe.sparsity import ActivationRecorder


class CheckpointScorer:
    """An open checkpoint; see `scoring.Scorer`.

    Args:
        folder: a run folder, or any Hugging Face folder; ReLU models get their threshold.
        dtype: of the weights: float32, bfloat16 or float16.
        device: cpu, cuda, ...

    Raises:
        CheckpointError: the checkpoint is damaged.
        UnsupportedModelError: a ReLU model without gated FFNs.
    """

    runtime = "torch"

    def __init__(self, folder: Path, *, dtype: str = "float32", device: str = "cpu", threads: int = 1) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.name = str(folder)
        self.threshold: float | None = None
        self._recorder: ActivationRecorder | None = None
        if config_activation(read_config(folder)) in RELU_NAMES:
            self._model, self.tokenizer, info = load_sparse_model(folder, DTYPES[dtype], device)
            self.threshold = info.threshold
        else:
            self._model, self.tokenizer = load_model(str(folder), DTYPES[dtype])
            self._model.to(device).eval()
        self._device = device
        self.n_vocab = self._model.get_output_embeddings().weight.shape[0]
        self.n_ctx_train = getattr(self._model.config.get_text_config(), "max_position_embeddings", sys.maxsize)

    def logits(self, ids: np.ndarray, start: int = 0) -> Iterator[np.ndarray]:
        with torch.inference_mode():
            tokens = torch.from_numpy(np.asarray(ids, np.int64))[None].to(self._device)
            rows = self._model(input_ids=tokens, use_cache=False).logits[0, start:]
        for i in range(0, len(rows), ROWS):
            yield rows[i : i + ROWS].float().cpu().numpy()

    def count_activations(self) -> None:
        if self.threshold is not None:
            self.close()
            self._recorder = ActivationRecorder(self._model).__enter__()

    def sparsity(self) -> list[float] | None:
        return None if self._recorder is None else self._recorder.sparsity()

    def n_bytes(self, ids: np.ndarray) -> int:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

"""Sequence to sequence with a RevCol encoder: its last level in the last column is the decoder's memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from .head import check_rates
from .revcol_vit import columns_of_tokens
from .vit import init_tokens

PAD, START, END = 0, 1, 2  # words that every vocabulary has


class RevColTranslator(nn.Module):
    """A transformer whose encoder is a RevCol of tokens; word embedding and positions are its stem.

    State-dict keys: ``source``, ``target`` (embeddings), ``positions``, ``columns.steps.{n}.{fs,gs}.{l}.*``,
    ``decoder.*``, ``head``.

    Args:
        source_words: size of the source's vocabulary; word 0 pads, 1 starts and 2 ends a sentence, in both.
        target_words: size of the target's.
        dim: width of a token.
        heads: heads of attention.
        blocks: transformer blocks per level of a column.
        columns: number of columns.
        decoder_layers: layers of the decoder.
        length: the longest sentence.
        backprop: of the encoder, as in Stack.
        drop_rate: dropout of embeddings and of every residual function.

    Shapes:
        source: (n, s) words, target: (n, t) words, both padded; the result is (n, t, target_words).

    Raises:
        SchemeError: a wrong option, or a sentence that is too long.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, appendix.

    Example:
        >>> import torch
        >>> net = RevColTranslator(9, 7, dim=16, heads=2, blocks=(1, 1), columns=2, decoder_layers=1)
        >>> net(torch.tensor([[1, 5, 2]]), torch.tensor([[1, 4, 4, 2]])).shape
        torch.Size([1, 4, 7])
    """

    def __init__(
        self,
        source_words: int,
        target_words: int,
        dim: int = 512,
        heads: int = 8,
        blocks: Sequence[int] = (1, 1, 1),
        columns: int = 4,
        decoder_layers: int = 6,
        length: int = 256,
        backprop: str = "store",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_rates(drop_rate=drop_rate)
        if columns < 1 or not blocks or min(blocks) < 1:
            raise SchemeError(
                f"RevColTranslator: blocks {tuple(blocks)}, columns {columns}; want at least one of each."
            )
        self.length = length
        self.source = nn.Embedding(source_words, dim)
        self.target = nn.Embedding(target_words, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
        self.drop = nn.Dropout(drop_rate)
        self.columns = columns_of_tokens(columns, dim, heads, blocks, drop=drop_rate, backprop=backprop)
        layer = nn.TransformerDecoderLayer(dim, heads, 4 * dim, drop_rate, F.gelu, batch_first=True, norm_first=True)  # pyright: ignore[reportArgumentType]
        self.decoder = nn.TransformerDecoder(layer, decoder_layers, nn.LayerNorm(dim))
        self.head = nn.Linear(dim, target_words)
        init_tokens(self)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Returns logits of the word that follows each word of the target."""
        return self.decode(target, self.encode(source), source == PAD)

    def encode(self, source: Tensor) -> Tensor:
        """Returns the memory (n, s, dim); no word attends to padding.

        Args:
            source: (n, s), words of the source, padded.
        """
        return self.columns(self._embedded(self.source, source), context=source != PAD)

    def decode(self, target: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
        """Returns logits (n, t, target_words); ``padded`` (n, s) marks the padding of the source.

        Args:
            target: (n, t), the words so far, the start first.
            memory: (n, s, dim), as ``encode`` returns it.
            padded: (n, s), true where there is no word.
        """
        # True means hidden: torch's decoder masks mark what must not be attended to, those of our attention what may
        # be.
        later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        x = self._embedded(self.target, target)
        return self.head(self.decoder(x, memory, tgt_mask=later, memory_key_padding_mask=padded))

    @torch.no_grad()
    def translate(self, source: Tensor, limit: int | None = None) -> Tensor:
        """Decodes greedily, word by word, until every sentence ends: (n, t), padded, without the start.

        Dropout acts unless the network is in evaluation mode.

        Args:
            source: (n, s), words of the source, padded.
            limit: maximum number of words of a translation, the start included; None means the number of positions.

        Raises:
            SchemeError: a limit that is not a whole number from 1 to the number of positions.
        """
        limit = self.length if limit is None else limit
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= self.length:
            raise SchemeError(f"translate: limit is {limit!r}, want a whole number from 1 to {self.length}.")
        memory, padded = self.encode(source), source == PAD
        words = torch.full((len(source), 1), START, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(limit - 1):
            # A sentence that has ended is continued by padding, until the longest of the batch has ended.
            word = self.decode(words, memory, padded)[:, -1].argmax(-1).masked_fill(done, PAD)
            words = torch.cat([words, word[:, None]], 1)
            done = done | (word == END)
            if done.all():
                break
        return words[:, 1:]

    def _embedded(self, table: nn.Embedding, words: Tensor) -> Tensor:
        if words.shape[1] > self.length:
            raise SchemeError(f"a sentence has {words.shape[1]} words, the longest may have {self.length}.")
        # The embedding has a standard deviation of 0.02, and is scaled to the size that the residual functions work at.
        return self.drop(table(words) * table.embedding_dim**0.5 + self.positions[: words.shape[1]])

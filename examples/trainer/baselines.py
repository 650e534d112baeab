"""An LSTM with the calls of S4Model, to put beside it."""

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class LSTMModel(nn.Module):
    """Encoder, LSTM layers, pooling over time, decoder.

    Args:
        encoder: maps inputs (B, L, ...) to (B, L, d_model).
        lstm: with `batch_first=True`.
        decoder: maps (..., d_model) to outputs.
        pooling: none, mean or last, as in S4Model.
    """

    def __init__(self, encoder: nn.Module, lstm: nn.LSTM, decoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.lstm, self.decoder, self.pooling = encoder, lstm, decoder, pooling

    def forward(self, u: Tensor, *, lengths: Tensor | None = None, rate: float | Tensor = 1.0) -> Tensor:
        """(B, L, ...) to (B, L, ...) without pooling, else (B, ...). An LSTM knows no rate: it is ignored."""
        x = self.encoder(u)
        if lengths is None:
            x, (last, _) = self.lstm(x)
            length: Tensor | int = x.shape[1]
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, (last, _) = self.lstm(packed)
            x, _ = pad_packed_sequence(packed, batch_first=True, total_length=u.shape[1])
            length = lengths[:, None].to(x.device)
        if self.pooling == "last":
            x = last[-1]
        elif self.pooling == "mean":
            x = x.sum(1) / length
        return self.decoder(x)

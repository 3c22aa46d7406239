"""Predicts the next words of captions, with cached keys and values of the images and of earlier words.

A word attends to its image and to earlier words (`SequenceLayout.causal_captions`), so cached keys and values never
change. Images are encoded as pairs with empty captions, because images of pairs use other experts than images without
text.
"""

# I images, B beams, R = I * B captions, N rows per image, L words so far (BOS included), D hidden, H heads,
# K head width, V vocabulary.

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError
from beit3_ds.layout import SequenceLayout
from beit3_ds.model.block import Block
from beit3_ds.model.task_model import TaskModel


class CaptionDecoder:
    """Holds the cached keys and values of images and of their unfinished captions.

    All images have the same number of captions (beams). The captions of one image are consecutive and share the image's
    keys and values.
    """

    def __init__(self, model: TaskModel, pixels: Tensor, mask_id: int) -> None:
        """Encodes the images, and caches their keys and values.

        Under tensor parallelism, all ranks must make the same calls. Sequence parallelism is not supported.

        Args:
            model: model with all layers and a head that predicts words; must accept pairs.
            pixels: images, (images, 3, image_size, image_size) in [-1, 1], on the model's device.
            mask_id: id of the mask token, at which the model predicts the next word.

        Raises:
            ConfigError: if the model does not accept pairs or does not predict words.
        """
        words = None if model.heads is None else model.heads.word_layer
        if words is None or "pairs" not in model.config.inputs or model.embeddings is None:
            raise ConfigError(
                f"captions need a model that takes pairs and predicts words, but this one takes "
                f"{' and '.join(model.config.inputs)} and {'does not predict' if words is None else 'predicts'} words. "
                "Load weights of captioning or pretraining, with pairs among their inputs."
            )
        assert not model.tensor.divides_rows, "generation needs all rows on every tensor-parallel rank"
        self._model, self._embeddings, self._words, self._mask_id = model, model.embeddings, words, mask_id
        self._blocks: list[Block] = [model.blocks[str(layer)] for layer in range(model.config.num_layers)]  # type: ignore[misc]
        self._images: list[tuple[Tensor, Tensor]] = []  # one pair per block, (I, H, N, K)
        self._captions: list[tuple[Tensor, Tensor]] = []  # one pair per block, (R, H, L, K)
        self._num_words = 0
        self._encode_images(pixels)

    def next_words(self, ids_R: Tensor) -> Tensor:
        """Appends a word to each caption, and returns the log-probabilities of the following word.

        Args:
            ids_R: token id of the word to append to each caption, (captions,) int64. In the first call, pass the id of
                BOS once per image.

        Returns:
            Log-probabilities, (captions, vocabulary) float32.
        """
        position = self._num_words
        pairs_R2 = torch.stack([ids_R, torch.full_like(ids_R, self._mask_id)], dim=1)
        positions_R2 = torch.tensor([position, position + 1], device=ids_R.device).expand_as(pairs_R2)
        x_SD = self._embeddings.embed_tokens(pairs_R2.flatten(), positions_R2.flatten()).to(self._model.stream_dtype)
        layout = SequenceLayout(0, (2,) * len(ids_R), (), image_length=0)
        captions = []
        for index, block in enumerate(self._blocks):
            attend, kept = self._attend_to_cache(index)
            x_SD = block.ffn(block.attention(x_SD, None, layout, attend), None, layout)
            captions.append(kept[0])
        self._captions, self._num_words = captions, position + 1
        return self._predict(x_SD[1::2])

    def select(self, rows: Sequence[int]) -> None:
        """Replaces the captions by copies of selected captions. All images must get the same number of captions.

        Args:
            rows: index of the caption to copy, for each new caption.
        """
        index = torch.tensor(rows, dtype=torch.int64, device=self._captions[0][0].device)
        self._captions = [
            (keys.index_select(0, index), values.index_select(0, index)) for keys, values in self._captions
        ]

    def drop_images(self, order: Sequence[int]) -> None:
        """Drops the cached keys and values of all images that are not in `order`.

        The cached captions do not change. Call `select` next to update them.

        Args:
            order: current indices of the remaining images, in their new order. If a remaining image i is below
                len(order), then `order[i]` must be i. The other entries are images with larger indices, which move to
                the places of dropped images.
        """
        for keys, values in self._images:
            for place, image in enumerate(order):
                if place != image:
                    assert image >= len(order), "an image that remains keeps its place"
                    keys[place].copy_(keys[image])
                    values[place].copy_(values[image])
        self._images = [(keys[: len(order)], values[: len(order)]) for keys, values in self._images]

    def _encode_images(self, pixels: Tensor) -> None:
        config, device, count = self._model.config, pixels.device, len(pixels)
        batch = PackedBatch(
            num_images=0,
            num_pairs=count,
            caption_lengths=(0,) * count,
            text_lengths=(),
            pixels=pixels,
            patch_mask=torch.zeros(count, config.num_patches, dtype=torch.bool, device=device),
            token_ids=torch.empty(0, dtype=torch.int64, device=device),
            causal_captions=True,
        )
        x_TD = self._embeddings(batch)
        for block in self._blocks:
            within = block.attention.within(batch.layout)
            kept: list[tuple[Tensor, Tensor]] = []

            def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, within=within, kept=kept) -> Tensor:  # type: ignore[no-untyped-def]
                kept.append((_by_sequence(k_THK, count).contiguous(), _by_sequence(v_THK, count).contiguous()))
                y_THK: Tensor = within(q_THK, k_THK, v_THK)
                return y_THK

            x_TD = block.attention(x_TD, None, batch.layout, attend)
            self._images.append(kept[0])
            if block is not self._blocks[-1]:  # after the last attention, nothing reads the images' rows
                x_TD = block.ffn(x_TD, None, batch.layout)
        empty = [keys.new_empty(count, keys.shape[1], 0, keys.shape[3]) for keys, _ in self._images]
        self._captions = [(keys, keys) for keys in empty]

    def _attend_to_cache(self, index: int) -> tuple[Callable[..., Tensor], list[tuple[Tensor, Tensor]]]:
        """Returns the attention function of block `index`, and an empty list that the attention function fills.

        The attention function computes two rows per caption: the last word so far, and the mask token. These rows
        attend to the image and the caption. The attention function also appends one pair to the list: the keys and the
        values of all words so far, without the mask tokens.
        """
        image_keys, image_values = self._images[index]
        old_keys, old_values = self._captions[index]
        kept: list[tuple[Tensor, Tensor]] = []

        def attend(q_SHK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
            count = len(q_SHK) // 2
            q_RH2K, k_RH2K, v_RH2K = (_by_sequence(x, count) for x in (q_SHK, k_SHK, v_SHK))
            keys = torch.cat([old_keys, k_RH2K], dim=2)
            values = torch.cat([old_values, v_RH2K], dim=2)
            kept.append((keys[:, :, :-1], values[:, :, :-1]))  # the mask token is not part of the caption
            y_RH2K = attend_to_image_and_caption(q_RH2K, image_keys, image_values, keys, values)
            return y_RH2K.transpose(1, 2).flatten(0, 1)

        return attend, kept

    def _predict(self, x_RD: Tensor) -> Tensor:
        model = self._model
        if model.norm is not None:
            layout = SequenceLayout(0, (1,) * len(x_RD), (), image_length=0)
            x_RD = model.norm(x_RD, layout.expert_slices(model.config.attention_experts)).h_TD
        return self._words.logits(x_RD.to(self._words.weight.dtype)).float().log_softmax(-1)


def attend_to_image_and_caption(
    q_RH2K: Tensor, image_keys: Tensor, image_values: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Computes causal attention of each caption's last two rows to the image and the caption.

    All captions of an image use the image's keys and values in one product, without copying or rereading them. There
    are I images of N rows, and R captions with L words so far and a mask token, so L + 1 rows. The R / I captions of an
    image are consecutive. H heads have K columns each.

    Args:
        q_RH2K: queries of each caption's last word and of the mask token after it.
        image_keys: keys of the images, (I, H, N, K).
        image_values: values of the images, (I, H, N, K).
        keys: keys of the captions, including the last two rows, (R, H, L + 1, K).
        values: values of the captions, including the last two rows, (R, H, L + 1, K).

    Returns:
        Attention outputs of the last two rows of each caption, (R, H, 2, K).
    """
    num_images, num_rows = len(image_keys), image_keys.shape[2]
    beams = len(q_RH2K) // num_images
    q_RH2K = q_RH2K * q_RH2K.shape[-1] ** -0.5

    def by_image(x_RH2X: Tensor) -> Tensor:
        return x_RH2X.unflatten(0, (num_images, beams)).transpose(1, 2).flatten(2, 3)  # (I, H, B * 2, X)

    def by_caption(x_IHSX: Tensor) -> Tensor:
        return x_IHSX.unflatten(2, (beams, 2)).transpose(1, 2).flatten(0, 1)  # (R, H, 2, X)

    to_image = by_caption(by_image(q_RH2K) @ image_keys.transpose(2, 3))
    to_caption = q_RH2K @ keys.transpose(2, 3)
    to_caption[:, :, 0, -1] = -torch.inf  # a word does not attend to the mask token after it
    weights = torch.cat([to_image, to_caption], dim=3).float().softmax(-1).to(values.dtype)
    of_image, of_caption = weights.split([num_rows, keys.shape[2]], dim=3)
    return by_caption(by_image(of_image) @ image_values) + of_caption @ values


def _by_sequence(x_THK: Tensor, count: int) -> Tensor:
    """Views the packed rows of `count` sequences of equal length as (sequences, H, rows, K)."""
    return x_THK.unflatten(0, (count, -1)).transpose(1, 2)

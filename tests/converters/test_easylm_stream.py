"""EasyLM's files, against an encoder written from their specification."""

import random
import struct

import ml_dtypes
import msgpack
import numpy as np
import pytest

from easylm import storage
from easylm.converters import msgpack_scan
from easylm.converters.easylm_stream import EasyLMSource, Weight, wanted_weights
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from tests import bucket
from tests.converters import easylm_encoder as encoder

# head_dim 6 of which the halves (3) differ from the pairs (2), and 4 heads over 2 KV heads.
EMBED, MLP, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 24, 20, 31, 4, 2, 6, 12
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}


def hf_weights(dtype=np.float32, layers=LAYERS):
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, EMBED), "model.norm": (EMBED,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (HEADS * HEAD_DIM, EMBED),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, EMBED),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, EMBED),
                "self_attn.o_proj": (EMBED, HEADS * HEAD_DIM),
                "mlp.gate_proj": (MLP, EMBED),
                "mlp.up_proj": (MLP, EMBED),
                "mlp.down_proj": (EMBED, MLP),
                "input_layernorm": (EMBED,),
                "post_attention_layernorm": (EMBED,),
            }.items()
        }
    shapes["lm_head"] = (VOCAB, EMBED)
    return {f"{name}.weight": rng.normal(size=s).astype(dtype) for name, s in shapes.items()}


def tree(dtype=np.float32, layers=LAYERS):
    return encoder.from_hf(hf_weights(dtype, layers), HEADS, KV_HEADS)


def source(path, config=CONFIG, unpermuted=False):
    return EasyLMSource(str(path), config, "hf/config.json", unpermuted)


def saved(tmp_path, content, name="streaming_params"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def assert_all_read(read, weights):
    assert set(read.tensors) == set(weights)
    for name, wanted in weights.items():
        info = read.tensors[name]
        assert (info.shape, info.dtype) == (wanted.shape, wanted.dtype)
        for start, end in ((0, None), (1, 3), (len(wanted) - 1, None), (2, 2)):
            found = read.read(name, start, end)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted[start:end])


FILES = {
    "sorted stream": lambda params: encoder.stream(params, lexicographic=True),
    "unsorted stream": lambda params: encoder.stream(params, lexicographic=False),
    "chunked stream": lambda params: encoder.stream(params, True, chunk_bytes=100),
    "sorted state": lambda params: encoder.stream(encoder.train_state(params), True),
    "unsorted state": lambda params: encoder.stream(encoder.train_state(params), False, 100),
    "document": lambda params: encoder.document(params),
    "chunked document": lambda params: encoder.document({"params": params}, 100),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_model(tmp_path, kind, dtype):
    read = source(saved(tmp_path, FILES[kind](tree(dtype))))
    assert_all_read(read, hf_weights(dtype))
    size = sum(array.nbytes for array in hf_weights(dtype).values())
    what = "train state" if "state" in kind else "parameters"
    assert read.kind.startswith(f"EasyLM {what}, 1 file, {size / 1000:.1f} kB of weights in 111 te")
    # step, mini_step, gradient_step, two counts, and three arrays for each of the 111 weights
    ignored = "; 338 other entries (optimizer state, step) ignored"
    assert read.kind.endswith(ignored if "state" in kind else "tensors")
    assert read.folder == "hf"


def test_the_rotation_of_transformers_gives_what_interleaved_rotation_gave(tmp_path):
    """Pairs rotated as complex numbers in EasyLM's order are halves rotated in Hugging Face's."""
    params = tree()
    read = source(saved(tmp_path, encoder.stream(params, True)))
    x = np.random.default_rng(1).normal(size=EMBED)
    angles = 3 * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    for name, theirs, heads in (("q", "wq", HEADS), ("k", "wk", KV_HEADS)):
        easylm = x @ params["transformer"]["h"]["5"]["attention"][theirs]["kernel"]
        pairs = easylm.reshape(heads, HEAD_DIM // 2, 2)
        rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        hf = (read.read(f"model.layers.5.self_attn.{name}_proj.weight") @ x).reshape(heads, -1)
        first, second = hf[:, : HEAD_DIM // 2], hf[:, HEAD_DIM // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        np.testing.assert_allclose(first * cos - second * sin, rotated.real, rtol=1e-6)
        np.testing.assert_allclose(second * cos + first * sin, rotated.imag, rtol=1e-6)


def test_unpermuted_files_are_only_transposed(tmp_path):
    path = saved(tmp_path, encoder.stream(tree(), True))
    read = source(path, unpermuted=True)
    stored = tree()["transformer"]["h"]["3"]["attention"]["wq"]["kernel"]
    np.testing.assert_array_equal(read.read("model.layers.3.self_attn.q_proj.weight"), stored.T)
    assert not np.array_equal(stored.T, hf_weights()["model.layers.3.self_attn.q_proj.weight"])


def test_the_bytes_of_the_specification(tmp_path):
    data = np.arange(6).astype(ml_dtypes.bfloat16)
    # An ext's count leaves out its type byte: 93, 92 02 03, a8 + 8, c4 0c + 12 are 27 = 1b.
    content = (
        b"\x92\x93\xabtransformer\xa3wte\xa9embedding\xc4\x1e"
        b"\xc7\x1b\x01\x93\x92\x02\x03\xa8bfloat16\xc4\x0c" + data.tobytes()
    )
    key = ("transformer", "wte", "embedding")
    assert encoder.record(key, data.reshape(2, 3)) == content
    path = saved(tmp_path, content)
    found, cut = msgpack_scan.scan_stream(str(path))
    assert cut == ""
    assert set(found) == {key}
    assert found[key].shape == (2, 3)
    assert found[key].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found[key].read(str(path)), data.reshape(2, 3))


def test_a_bucket_holds_the_same(tmp_path):
    with bucket.running_bucket() as url:
        params = tree(layers=1)
        storage.write_bytes(f"{url}/streaming_params", encoder.stream(params, True, 500))
        read = source(f"{url}/streaming_params", {**CONFIG, "num_hidden_layers": 1})
        assert_all_read(read, hf_weights(layers=1))


def test_tied_embeddings_need_no_head(tmp_path):
    params = tree()
    weights = hf_weights()
    del params["lm_head"], weights["lm_head.weight"]
    path = saved(tmp_path, encoder.stream(params, True))
    assert_all_read(source(path, {**CONFIG, "tie_word_embeddings": True}), weights)
    with pytest.raises(InputError, match=r"1 of 111 tensors are missing.*: lm_head/kernel"):
        source(path)


def boundaries(content):
    """The first byte of every record, and where its data begins."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(content) + 1)
    unpacker.feed(content)
    places = [0]
    for _ in unpacker:
        places.append(unpacker.tell())
    return places[:-1]


@pytest.mark.parametrize(
    "kind", ["sorted stream", "unsorted stream", "sorted state", "document", "chunked document"]
)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    params = tree(layers=2)
    config = {**CONFIG, "num_hidden_layers": 2}
    content = FILES[kind](params)
    places = boundaries(content) if "document" not in kind else [0]
    end = len(content)
    if kind == "sorted state":
        # Behind the weights only the step follows, and a file without it has all weights.
        end -= len(encoder.record(("step",), 14))
    cuts = {place + step for place in places for step in (-1, 0, 1, 2, 3, 20, 40)} | {end - 1}
    cuts |= set(random.Random(0).sample(range(end), 50))
    path = tmp_path / "streaming_params"
    for cut in sorted(cut for cut in cuts if 0 <= cut < end):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"of 21 tensors are missing") as error:
            source(path, config)
        if cut not in places:
            assert f"the file has {cut}" in str(error.value)
            assert "wants bytes up to" in str(error.value) or "wanted bytes" in str(error.value)
        assert "not a tensor of" not in str(error.value)


def test_a_cut_between_records_lists_the_missing_tensors(tmp_path):
    content = encoder.stream(tree(), lexicographic=True)
    last_two = boundaries(content)[-2]
    with pytest.raises(InputError) as error:
        source(saved(tmp_path, content[:last_two]))
    assert "2 of 111 tensors are missing" in str(error.value)
    assert "transformer/ln_f/kernel, transformer/wte/embedding" in str(error.value) or (
        "transformer/wte/embedding, transformer/ln_f/kernel" in str(error.value)
    )
    assert "hf/config.json" in str(error.value)


def test_a_cut_in_a_record_says_at_which_byte(tmp_path):
    content = encoder.stream(tree(), lexicographic=True)
    start = boundaries(content)[-1]
    with pytest.raises(InputError) as error:
        source(saved(tmp_path, content[:-5]))
    message = str(error.value)
    assert (
        f"cut inside the record that begins at byte {start}: transformer/wte/embedding" in message
    )
    assert f"wants bytes up to {len(content)}; the file has {len(content) - 5}" in message
    assert "1 of 111 tensors are missing" in message
    assert "transformer/wte/embedding" in message


def test_long_lists_of_missing_tensors_end(tmp_path):
    with pytest.raises(InputError, match=r"111 of 111 tensors are missing.* and 61 more"):
        source(saved(tmp_path, b""))


def test_a_file_of_another_size_is_described(tmp_path):
    path = saved(tmp_path, encoder.stream(tree(), True))
    config = {**CONFIG, "vocab_size": 32, "num_hidden_layers": 11}
    with pytest.raises(InputError) as error:
        source(path, config)
    message = str(error.value)
    assert "transformer/h/11/attention/wq/kernel: not a tensor of a LLaMA of the size" in message
    assert "transformer/wte/embedding: found [31, 24]; hf/config.json wants [32, 24]" in message
    assert "lm_head/kernel: found [24, 31]; hf/config.json wants [24, 32]" in message


def test_a_weight_that_is_no_array_is_refused(tmp_path):
    params = tree()
    params["lm_head"]["kernel"] = 3
    with pytest.raises(InputError, match=r"lm_head/kernel: found 3; hf/config.json wants"):
        source(saved(tmp_path, encoder.stream(params, True)))


def test_a_reward_model_is_called_so(tmp_path):
    params = tree()
    params["score"] = {"kernel": np.zeros((EMBED, 1), np.float32)}
    del params["lm_head"]
    with pytest.raises(InputError, match=r"holds score/kernel, the head of a reward or value mod"):
        source(saved(tmp_path, encoder.stream(params, True)))


def test_a_config_with_biases_is_of_another_model(tmp_path):
    path = saved(tmp_path, encoder.stream(tree(), True))
    for field in ("attention_bias", "mlp_bias"):
        with pytest.raises(InputError, match="EasyLM's LLaMA has no biases"):
            source(path, {**CONFIG, field: True})


def ext(payload, code=1):
    return msgpack.packb(msgpack.ExtType(code, payload))


def raw_record(key, document):
    return msgpack.packb([key, document])


GOOD = msgpack.packb([[2], "float32", bytes(8)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x93\x91\xa1a\xc4\x00\x00", "found array 3; wanted array of 2"),
        (b"\xc1" * 9, "near byte 1: found byte 0xc1; wanted a msgpack object"),
        (msgpack.packb(["a", b""]), "found str 'a'; wanted a record's key"),
        (msgpack.packb([[], b""]), "found array 0; wanted a record's key"),
        (msgpack.packb([[1], b""]), "found scalar 1; wanted str"),
        (msgpack.packb([["a"], "text"]), "found str 'text'; wanted bin"),
        (raw_record(["a" * 5000], b"\x01"), "found a text of 5000 bytes; wanted a name"),
        (b"\x92\x91\xa1\xff\xc4\x01\x01", "found text that is not UTF-8"),
        (raw_record(["a"], ext(GOOD) + b"\x00"), "found a value of a that is not one array"),
        (raw_record(["a"], b"\xa1b"), "found str at the top; wanted a map, an array or a number"),
        (raw_record(["a"], msgpack.packb({"b": 1})), "found a value of a that is not one array"),
        (raw_record(["a"], ext(GOOD, 2)), "found msgpack extension 2; wanted 1 or 3"),
        (
            raw_record(["a"], ext(GOOD[:-1])) + raw_record(["b"], ext(GOOD)),
            r"found 8 bytes for float32 \[2\]; wanted as many",
        ),
        (
            raw_record(["a"], ext(msgpack.packb([[2], "float31", bytes(8)]))),
            "found dtype 'float31'; wanted one of bfloat16",
        ),
        (
            raw_record(["a"], ext(msgpack.packb([[3], "float32", bytes(8)]))),
            r"found 8 bytes for float32 \[3\]; wanted as many",
        ),
        (
            raw_record(["a"], ext(msgpack.packb([[-2], "float32", bytes(8)]))),
            r"found shape \(-2,\); wanted whole numbers",
        ),
        (
            raw_record(["a"], ext(GOOD)) * 2,
            "found a a second time; wanted every key once",
        ),
        (
            raw_record(["a"], msgpack.packb(dict.fromkeys("bc", 1)).replace(b"\xa1c", b"\xa1b")),
            "found b a second time; wanted every key once",
        ),
        (raw_record(["a"], b"\x81\xa1b" * 100 + b"\x01"), "found more than 64 levels"),
    ],
)
def test_damage_is_described(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        msgpack_scan.scan_stream(str(saved(tmp_path, content)))
    assert "the file is damaged, or not written by EasyLM or flax" in str(error.value)


def chunked(**changes):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    parts = encoder.leaf(array, chunk_bytes=8)
    return raw_record(["a"], msgpack.packb({**parts, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"0": 2, "1": 4}}, "found 24 bytes in the chunks of .*; wanted 32 bytes"),
        ({"chunks": {}}, r"found chunks \[\] of"),
        ({"chunks": {"0": 3}}, "found chunks/0; wanted shape and chunks"),
        ({"shape": {"x": 2}}, "found shape/x; wanted shape and chunks"),
        ({"more": 1}, "found more; wanted shape and chunks"),
    ],
)
def test_damaged_chunks_are_described(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        msgpack_scan.scan_stream(str(saved(tmp_path, chunked(**changes))))
    found, _ = msgpack_scan.scan_stream(str(saved(tmp_path, chunked())))
    assert len(found[("a",)].pieces) == 3


def test_chunks_of_a_missing_number_or_of_two_dtypes_are_refused(tmp_path):
    pair = np.arange(2, dtype=np.float32)
    gap = {"0": encoder.array_ext(pair), "2": encoder.array_ext(pair), "3": encoder.array_ext(pair)}
    with pytest.raises(InputError, match=r"found chunks \[0, 2, 3\] of"):
        msgpack_scan.scan_stream(str(saved(tmp_path, chunked(chunks=gap))))
    mixed = {
        "0": encoder.array_ext(np.arange(4, dtype=np.float32)),
        "1": encoder.array_ext(np.arange(1, dtype=np.float64)),
    }
    with pytest.raises(InputError, match=r"of one dtype"):
        msgpack_scan.scan_stream(str(saved(tmp_path, chunked(chunks=mixed))))


def test_chunks_are_joined_in_the_order_of_their_numbers(tmp_path):
    array = np.arange(33, dtype=np.float32)
    parts = encoder.leaf(array, chunk_bytes=12)
    assert len(parts["chunks"]) == 11
    parts["chunks"] = dict(sorted(parts["chunks"].items()))
    assert list(parts["chunks"])[:3] == ["0", "1", "10"]
    path = saved(tmp_path, raw_record(["a"], msgpack.packb(parts)))
    found, _ = msgpack_scan.scan_stream(str(path))
    np.testing.assert_array_equal(found[("a",)].read(str(path)), array)
    np.testing.assert_array_equal(found[("a",)].read(str(path), 5, 32), array[5:32])


def test_bytes_behind_a_document_are_refused(tmp_path):
    content = encoder.document(tree()) + b"\x01"
    with pytest.raises(InputError, match=r"found more bytes after the document; wanted a file of"):
        source(saved(tmp_path, content, "flax_params"))


def test_changed_bytes_never_break_the_reader(tmp_path):
    """Whatever stands in the heads, the answer is an InputError or the right shapes."""
    params = tree(layers=1)
    config = {**CONFIG, "num_hidden_layers": 1}
    content = encoder.stream(params, True, chunk_bytes=600)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.choice(boundaries(content)) + rng.randrange(60)] = rng.randrange(256)
        try:
            read = source(saved(tmp_path, bytes(changed)), config)
        except InputError:
            refused += 1
            continue
        assert {name: info.shape for name, info in read.tensors.items()} == {
            name: array.shape for name, array in hf_weights(layers=1).items()
        }
    assert refused > 100


def write_head(file, key, nbytes, shape):
    """The bytes of a record before its data, with every length in its widest form."""
    inner = (
        msgpack.packb(list(shape)) + msgpack.packb("float32") + b"\xc6" + struct.pack(">I", nbytes)
    )
    ext_head = b"\xc9" + struct.pack(">IB", 1 + len(inner) + nbytes, 1) + b"\x93" + inner
    file.write(b"\x92" + msgpack.packb(list(key)) + b"\xc6")
    file.write(struct.pack(">I", len(ext_head) + nbytes) + ext_head)


def test_records_of_nearly_four_gib(tmp_path):
    """Of the two large arrays a sparse file holds only a few rows; the rest is never read."""
    embed, vocab = 2048, 500_000
    sizes = {"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = {**CONFIG, **sizes, "vocab_size": vocab, "hidden_size": embed, "head_dim": 4}
    config["num_hidden_layers"] = 1
    small = {
        name: Weight(weight.name, weight.shape)
        for name, weight in wanted_weights(LlamaConfig.from_hf(config, "c"), "c").items()
        if vocab not in weight.shape
    }
    marks = {0: 1.5, 262_143: 2.5, 262_144: 3.5, vocab - 1: 4.5}
    path = tmp_path / "streaming_params"
    with path.open("wb") as file:
        write_head(file, ("lm_head", "kernel"), vocab * embed * 4, (embed, vocab))
        file.seek(vocab * embed * 4, 1)
        write_head(file, ("transformer", "wte", "embedding"), vocab * embed * 4, (vocab, embed))
        start = file.tell()
        for row, mark in marks.items():
            file.seek(start + row * embed * 4)
            file.write(np.full(embed, mark, np.float32).tobytes())
        for key, weight in small.items():
            file.write(encoder.record(key, np.full(weight.shape, 7, np.float32)))
    assert path.stat().st_size > 2 * 4_096_000_000
    read = source(path, config)
    assert read.tensors["lm_head.weight"].nbytes == 4_096_000_000
    for row, mark in marks.items():
        found = read.read("model.embed_tokens.weight", row, row + 1)
        np.testing.assert_array_equal(found, [[mark] * embed])
    np.testing.assert_array_equal(read.read("model.norm.weight"), [7] * embed)

"""llama.cpp on one of the toy models. Runs in the peer's own environment: imports nothing of ours.

    python rival_llama.py MODEL_FOLDER f32|bf16 THREADS PROMPT_TOKENS NEW_TOKENS

Converts the folder to GGUF beside its weights when that is not there, then prints one JSON line: {"prefill_s", "gap_s"}.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path


def convert(folder, kind):
    """A Llama with tied embeddings to GGUF; query and key rows change from halves to neighbouring pairs."""
    import gguf
    from safetensors.torch import load_file

    target = folder / f"{kind}.gguf"
    if target.exists():
        return target
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    scratch = target.with_suffix(".part")
    writer = gguf.GGUFWriter(str(scratch), "llama")
    describe(writer, config)
    vocabulary(writer, folder, config["vocab_size"])
    bf16 = gguf.GGMLQuantizationType.BF16

    def add(name, tensor, matrix):
        array = tensor.float().numpy()
        if matrix and kind == "bf16":
            writer.add_tensor(name, gguf.quants.quantize(array, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(name, array)

    def paired(tensor, count):
        rows = tensor.shape[0] // count // 2
        return tensor.reshape(count, 2, rows, -1).swapaxes(1, 2).reshape(tensor.shape)

    writer.add_file_type({"f32": 0, "bf16": 32}[kind])
    add("token_embd.weight", weights["model.embed_tokens.weight"], True)
    add("output_norm.weight", weights["model.norm.weight"], False)
    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for layer in range(config["num_hidden_layers"]):
        source, block = f"model.layers.{layer}.", f"blk.{layer}."
        add(block + "attn_norm.weight", weights[source + "input_layernorm.weight"], False)
        add(block + "ffn_norm.weight", weights[source + "post_attention_layernorm.weight"], False)
        add(block + "attn_q.weight", paired(weights[source + "self_attn.q_proj.weight"], heads), True)
        add(block + "attn_k.weight", paired(weights[source + "self_attn.k_proj.weight"], kv_heads), True)
        for theirs, ours in names.items():
            add(f"{block}{ours}.weight", weights[f"{source}{theirs}.weight"], True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scratch.rename(target)
    return target


def describe(writer, config):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])


def vocabulary(writer, folder, size):
    """The tokenizer's own vocabulary, filled up to the model's size: the numbers fed are ids, no text passes through."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([known.get(i, f"<unused{i}>") for i in range(size)])
    writer.add_token_types([1 if i in known else 5 for i in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main():
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    threads, prompt_tokens, new_tokens = map(int, sys.argv[3:6])
    path = convert(folder, kind)
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    prefills, gaps = [], []
    for _ in range(3):
        model.reset()
        prompt = [random.randint(300, 4000) for _ in range(prompt_tokens)]
        start = time.perf_counter()
        model.eval(prompt)
        prefills.append(time.perf_counter() - start)
        for _ in range(new_tokens):
            start = time.perf_counter()
            model.eval([random.randint(300, 4000)])
            gaps.append(time.perf_counter() - start)
    print(json.dumps({"prefill_s": statistics.median(prefills), "gap_s": statistics.median(gaps)}))


if __name__ == "__main__":
    main()

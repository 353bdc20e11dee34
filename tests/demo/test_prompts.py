from pipelive_kv.demo.prompts import MIN_PROMPT_TOKENS, prompt_texts, prompt_tokens


def words(text):
    return [len(word) for word in text.split()]


def test_texts_are_long_and_varied():
    texts = prompt_texts()
    assert len(texts) >= 10
    assert len(set(texts)) == len(texts)
    assert len({text.split(".")[0] for text in texts}) == len(texts)
    for text in texts:
        assert len(text.split()) >= 220
        assert "#" not in text
        assert "---" not in text


def test_prompts_are_never_short_and_never_twice_the_same():
    assert all(len(prompt) >= MIN_PROMPT_TOKENS for prompt in prompt_tokens(30, words, 50))
    texts = prompt_tokens(30, lambda text: [sum(w.encode()) for w in text.split()], 9999)
    assert len(set(texts)) == 30


def test_numbers_where_there_is_no_tokenizer():
    prompts = prompt_tokens(12, None, 160)
    assert prompts == prompt_tokens(12, None, 160)
    assert len(set(prompts)) == 12
    for prompt in prompts:
        assert len(prompt) >= MIN_PROMPT_TOKENS
        assert all(0 <= token < 160 for token in prompt)

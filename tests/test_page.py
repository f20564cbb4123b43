"""tests.page: what the page holds, and what it does in a real browser (skipped where there is no Chromium)."""

import base64
import itertools
import json
import math
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import torch

from tests import page
from tests.conftest import ROOT, VERSIONS, tiny_model, v1_transformer, v2_bpe_rope

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ATTACK = "</script><script>document.title = 'attacked'</script>"


def refusal(arguments, capsys):
    """The one line with which the program ends."""
    with pytest.raises(SystemExit) as stop:
        page.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("page: error: ") and error.count("\n") == 1
    return error


def content(html):
    """What Python handed to the page's script."""
    return json.loads(html.split('id="content">')[1].split("</script>")[0])


def copy(folders, out, **changes):
    """Copies of some runs with changes in their result.json; returns the new folders."""
    for folder in folders:
        shutil.copytree(folder, out / folder.name, ignore=shutil.ignore_patterns("last.pt"))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        (out / folder.name / "result.json").write_text(json.dumps({**result, **changes}), encoding="utf-8")
    return [out / folder.name for folder in folders]


@pytest.fixture(scope="module")
def html(trained, small, tmp_path_factory):
    """The page about tiny runs whose names and samples attack it."""
    folders = copy(trained.values(), tmp_path_factory.mktemp("page"), data=ATTACK)
    (folders[0] / "sample.txt").write_text(ATTACK, encoding="utf-8")
    return page.build(folders, small)


def test_the_page_holds_the_numbers_of_the_runs(html, trained, text):
    held = content(html)
    assert [version["version"] for version in held["versions"]] == [version.__name__ for version in VERSIONS]
    assert held["passage"] in text[54_000:] and len(html) < 3_000_000
    for (version, folder), shown in zip(trained.items(), held["versions"]):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert shown["bits"] == list(result["context_bits_per_byte"].values())
        assert [row[0] for row in shown["log"]] == [10, 20, 30]  # without step 0
        assert shown["parameters"] == result["parameters"] and shown["train_seconds"] == result["train_seconds"]
        assert "".join(token[0] for token in shown["surprise"]) == held["passage"]


def test_surprise_and_expectations_are_those_of_the_model(trained):
    model, tokenizer, config = v2_bpe_rope.load(trained[v2_bpe_rope] / "best.pt")
    before, passage = "What say you to the king?\n" * 9, "I say that he is not the king."
    tokens = page.expectations(model, tokenizer, before, passage)
    ids = tokenizer.encode(before + passage)
    probabilities = model(torch.tensor([ids[-1 - config.block_size:-1]]))[0][0, -1].softmax(-1)
    text, bits, most_likely = tokens[-1]
    assert text == tokenizer.decode(ids[-1:]) and abs(bits + probabilities[ids[-1]].log2().item()) < 1e-3
    assert most_likely[0][0] == tokenizer.decode([probabilities.argmax().item()]) and len(most_likely) == 5
    assert abs(most_likely[0][1] - probabilities.max().item()) < 1e-4


@pytest.mark.parametrize("passage", ["naïve – 日本語 ☃\n", "plain"])
def test_characters_of_several_bytes_keep_their_place_and_all_bits(passage):
    tokenizer = v2_bpe_rope.BPETokenizer.train("日本 the cat naïve " * 20, 270)
    model, before = tiny_model(v2_bpe_rope, tokenizer.vocab_size), "日本 the cat\n"
    tokens = page.expectations(model, tokenizer, before, passage)
    ids, first = tokenizer.encode(before + passage), len(tokenizer.encode(before))
    assert ids[:first] == tokenizer.encode(before) and "".join(token[0] for token in tokens) == passage
    logits = [model(torch.tensor([ids[max(0, i - 16):i]]))[0][0, -1] for i in range(first, len(ids))]
    bits = [-x.log_softmax(-1)[i].item() / np.log(2) for x, i in zip(logits, ids[first:])]
    assert abs(sum(token[1] for token in tokens) - sum(bits)) < 0.02


def test_unknown_characters_count_as_one_token_each():
    tokens = page.expectations(tiny_model(v1_transformer, 4), v1_transformer.CharTokenizer("abc"), "abcabc", "aé☃b")
    assert [token[0] for token in tokens] == list("aé☃b")


def test_attention_is_kept_in_8_bits_and_its_reach_exactly(trained):
    model, tokenizer, _ = v1_transformer.load(trained[v1_transformer] / "best.pt")
    with torch.inference_mode():
        shown = page.attention(model, tokenizer, "What say you to the king?")
    weights = torch.stack([block.attention.weights[0] for block in model.blocks]).numpy()
    rows, columns = np.tril_indices(16)
    numbers = np.frombuffer(base64.b64decode(shown["weights"]), np.uint8).reshape(2, 2, -1) / 255
    assert np.abs(numbers**2 - weights[:, :, rows, columns]).max() < 0.005
    distance = np.arange(16)[:, None] - np.arange(16)
    assert np.allclose(shown["reach"], (weights * distance).sum(-1).mean(-1), atol=0.01)


def test_the_diffs_hold_both_files_and_as_many_changes_as_git_counts(html):
    for shown, (old, new) in zip(content(html)["diffs"], itertools.pairwise(VERSIONS)):
        lines = [(sign, "".join(text for _, text in parts)) for sign, parts in shown["rows"]]
        for version, sign in ((old, "-"), (new, "+")):
            program = (ROOT / f"{version.__name__}.py").read_text(encoding="utf-8").splitlines()
            assert [line for kind, line in lines if kind in (" ", sign)] == program
        git = ["git", "diff", "--no-index", "--numstat", f"{old.__name__}.py", f"{new.__name__}.py"]
        counted = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.split()[:2]
        assert [str(shown["added"]), str(shown["removed"])] == counted
        assert any(changed for _, parts in shown["rows"] for changed, _ in parts)  # marks inside a line


def test_long_contexts_are_read_in_steps_and_the_last_token_of_each_step_is_exact():
    """At a context of 192, three tokens share a window, and the last of them has all 192 tokens before it."""
    model = tiny_model(v1_transformer, 27, block_size=192)
    tokenizer = v1_transformer.CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
    before, passage = "the quick brown fox jumps over the lazy dog " * 9, "a fox sees the dog and"
    ids, first = tokenizer.encode(before + passage), len(before)
    logits = [model(torch.tensor([ids[i - 192:i]]))[0][0, -1] for i in range(first, len(ids))]
    exact = [-x.log_softmax(-1)[i].item() / np.log(2) for x, i in zip(logits, ids[first:])]
    shown = [token[1] for token in page.expectations(model, tokenizer, before, passage)]
    assert len(shown) == len(exact) == 22 and np.allclose(shown[2::3], exact[2::3], atol=0.002)


def test_what_changed_inside_a_line_is_marked():
    assert page.marked("ab cde f", "    ^   ") == [[0, "ab "], [1, "cde"], [0, " f"]]
    assert page.marked("", "") == []


def test_a_missing_version_is_left_out_with_a_word(trained, small, tmp_path, capsys):
    folders = copy([trained[v1_transformer], trained[v2_bpe_rope]], tmp_path)
    (folders[1] / "best.pt").unlink()
    page.main([str(tmp_path), "--data", str(small)])
    held = content((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [version["version"] for version in held["versions"]] == ["v1_transformer"]
    assert "v0_bigram is left out" in held["about"] and "v2_bpe_rope is left out: there is no check" in held["about"]


def test_what_does_not_fit_is_one_line_and_exit_status_2(trained, small, tmp_path, capsys):
    folder = trained[v1_transformer].parent
    copy([trained[VERSIONS[0]]], tmp_path, validation_sha256="other"), copy([trained[v1_transformer]], tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, words in (([tmp_path, "--data", small], "validation_sha256 differs"), ([folder], "with --data"),
                             ([folder, "--data", tmp_path / "none.txt"], "with --data"),
                             ([tmp_path / "empty"], "no finished run")):
        assert words in refusal(arguments, capsys)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, '{"version": "v0_bigram"}', "\xff", "NaN", "null"])
def test_a_damaged_result_is_one_line_and_exit_status_2(content, trained, small, tmp_path, capsys):
    copy([trained[VERSIONS[0]]], tmp_path)
    (tmp_path / "v0_bigram/result.json").write_bytes(content.encode("latin-1"))
    error = refusal([tmp_path, "--data", small], capsys)
    assert "result.json or log.csv in" in error and "is damaged" in error and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("changes", [{"parameters": "<b>"}, {"train_seconds": None}, {"steps": 10**400},
                                     {"train_seconds": math.inf}, {"context_bits_per_byte": {"1": math.nan}},
                                     {"context_bits_per_byte": ["<b>"]}, {"context_bits_per_byte": {"1": []}},
                                     {"version": ["v0_bigram"]}])
def test_a_wrong_number_in_a_result_is_one_line_and_exit_status_2(changes, trained, small, tmp_path, capsys):
    copy([trained[VERSIONS[0]]], tmp_path, **changes)
    assert "is damaged" in refusal([tmp_path, "--data", small], capsys)


@pytest.mark.parametrize("content", ["", "step\n", "step,seconds,bits_per_byte\n0,0,8\n", "a,b\n0,0\n1,1\n",
                                     "step,seconds,bits_per_byte\n0,0,8\n1,1\n",
                                     "step,seconds,bits_per_byte\n0,0,8\n1,1,nan\n", "\0\n\xff"])
def test_a_damaged_log_is_one_line_and_exit_status_2(content, trained, small, tmp_path, capsys):
    copy([trained[VERSIONS[0]]], tmp_path)
    (tmp_path / "v0_bigram/log.csv").write_bytes(content.encode("latin-1"))
    assert "is damaged" in refusal([tmp_path, "--data", small], capsys)


def test_a_model_that_predicts_nan_is_left_out(trained, small, tmp_path):
    folders = copy(list(trained.values())[:2], tmp_path)
    checkpoint = torch.load(folders[1] / "best.pt", weights_only=True)
    checkpoint["model"]["norm.weight"].fill_(math.nan)
    torch.save(checkpoint, folders[1] / "best.pt")
    held = content(page.build(folders, small))
    assert [version["version"] for version in held["versions"]] == ["v0_bigram"]
    assert "v1_transformer is left out: its predictions are not finite" in held["about"]


def test_fine_tuned_runs_and_results_of_other_programs_are_not_shown(trained, small, tmp_path):
    first, second = copy(list(trained.values())[:2], tmp_path)
    result = json.loads((second / "result.json").read_text(encoding="utf-8"))
    for other in ({**result, "init_from": "other.pt"}, {"accuracy": 1}):
        (second / "result.json").write_text(json.dumps(other), encoding="utf-8")
        assert [version["version"] for version in content(page.build([first, second], small))["versions"]] == ["v0_bigram"]


def test_many_rows_of_a_log_and_a_long_sample_are_cut(trained, small, tmp_path):
    folder, = copy([trained[VERSIONS[0]]], tmp_path)
    rows = "".join(f"{step},{step},{5 - step / 1e4}\n" for step in range(20_001))
    (folder / "log.csv").write_text("step,seconds,bits_per_byte\n" + rows, encoding="utf-8")
    (folder / "sample.txt").write_text("<" * 10**6, encoding="utf-8")
    html = page.build([folder], small)
    log = content(html)["versions"][0]["log"]
    assert len(html) < 500_000 and 400 < len(log) <= 500 and log[-1][0] == 20_000


def test_the_picture_that_readme_shows_is_a_small_png():
    picture = (ROOT / "tests/results/page.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) <= 250_000
    assert "](tests/results/page.png)" in (ROOT / "README.md").read_text(encoding="utf-8")


# -- in a browser --


class Browser:
    """Headless Chromium, driven through a pipe with the DevTools protocol; `errors` is what its console reports."""

    def __init__(self, program, folder):
        command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        (inward, self.pipe), (pipe, outward) = os.pipe(), os.pipe()
        import fcntl  # which Windows lacks

        old = inward, outward
        inward, outward = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in old)  # not 3 or 4 themselves
        ends = lambda: (os.dup2(inward, 3), os.dup2(outward, 4))  # noqa: E731 -- the file descriptors of the protocol
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=ends)
        for end in (*old, inward, outward):  # all but its own: when it ends, reading must end
            os.close(end)
        self.replies, self.session, self.errors, self.count = os.fdopen(pipe, "rb"), {}, [], 0
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.pipe, json.dumps(request).encode() + b"\0")
        silence = threading.Timer(120, self.process.kill)
        silence.start()
        while True:
            message = bytearray()
            while (byte := self.replies.read(1)) != b"\0":
                assert byte, "Chromium has ended"
                message += byte
            reply = json.loads(message)
            if reply.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.errors.append(reply["params"])
            if reply.get("id") == self.count:
                silence.cancel()
                return reply["result"]

    def js(self, expression):
        """The value of a JavaScript expression."""
        reply = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, html, file, width=1280, scheme="light"):
        file.write_text(html, encoding="utf-8")
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=file.as_uri())
        for _ in range(6000):
            if self.js("document.readyState === 'complete' && !!document.querySelector('#samples pre')"):
                return
            time.sleep(0.01)
        raise AssertionError(f"the page's script did not reach its end: {self.errors}")

    def point(self, element, click=False):
        """Move the pointer over the middle of an element (a JavaScript expression), and perhaps click."""
        self.js(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.js(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased")[:3 if click else 1]:
            button = "none" if kind == "mouseMoved" else "left"
            self("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button=button, clickCount=1)

    def press(self, element, key):
        """Press a key while an element has the focus."""
        self.js(f"{element}.focus()")
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={" ": 32}.get(key, 0))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not BROWSER or os.name == "nt":
        pytest.skip("there is no Chromium: apt-get install chromium")
    browser = Browser(BROWSER, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser("Browser.close")
    browser.process.wait(10)


@pytest.fixture
def opened(browser, html, tmp_path):
    """The page, opened at desktop width."""
    browser.errors.clear()
    browser.open(html, tmp_path / "page.html")
    yield browser
    assert not browser.errors


def test_the_page_opens_and_runs_no_script_but_its_own(opened):
    assert opened.js("document.title") == "Language models, side by side"
    assert opened.js("document.scripts.length") == 2 and ATTACK in opened.js("document.body.innerText")
    counts = [opened.js(f"document.querySelectorAll('{x}').length") for x in ("#ladder tr", ".chart", "#diffs details")]
    assert counts == [5, 2, 3] and opened.js("document.querySelectorAll('.heads').length") == 3
    assert opened.js("performance.getEntriesByType('resource').length") == 0


def test_lines_of_the_chart_are_switched_off_by_pointer_and_keyboard(opened):
    curves = "document.querySelectorAll('.chart .curve').length"
    assert opened.js(curves) == 8
    opened.point("document.querySelector('#legend input')", click=True)
    assert opened.js(curves) == 6
    opened.press("document.querySelector('#legend input')", " ")
    assert opened.js(curves) == 8


def test_pointer_and_arrow_keys_read_values_from_the_chart(opened):
    said = "document.querySelector('#legend output').textContent"
    chart = "document.querySelector('.chart')"
    assert "at step 30," in opened.js(said)
    opened.point(chart)
    assert "at step 10," in opened.js(said) or "at step 20," in opened.js(said)
    opened.press(chart, "ArrowRight"), opened.press(chart, "ArrowRight")
    assert "at step 30," in opened.js(said)
    opened.press(chart, "ArrowLeft")
    assert "at step 20," in opened.js(said) and opened.js("document.querySelectorAll('.dot[r=\"7\"]').length") == 8


def test_pointing_at_a_token_shows_what_every_version_expected_there(opened, html):
    held = content(html)["versions"]
    row = "document.querySelectorAll('#passage .text')[2]"
    opened.point(f"{row}.children[20]")
    text, bits, most_likely = held[2]["surprise"][20]
    panel = "document.querySelectorAll('#expected > div')"
    assert f"{bits:.1f} bits" in opened.js(f"{panel}[2].innerText") and opened.js(f"{panel}.length") == 4
    shown = opened.js(f"[...{panel}[2].querySelectorAll('.bar span:first-child')].map(x => x.textContent)")
    assert shown == [token.replace(" ", "·").replace("\n", "↵") for token, _ in most_likely]
    assert opened.js(f"{row}.querySelectorAll('.seen').length") == 16
    opened.press(row, "ArrowRight")
    assert opened.js(f"[...{row}.children].findIndex(x => x.classList.contains('here'))") == 21
    assert f"{held[2]['surprise'][21][1]:.1f} bits" in opened.js(f"{panel}[2].innerText")


def test_a_head_is_chosen_and_pointing_at_a_token_shows_where_it_looks(opened):
    words, heads = ("document.querySelector('#attention > div:last-child " + x + "')" for x in ("p", ".heads"))
    opened.point(f"{heads}.querySelectorAll('td')[1]", click=True)
    assert opened.js(f"{words}.textContent").startswith("Layer 1, head 2:")
    opened.press(heads, "ArrowDown")
    assert opened.js(f"{words}.textContent").startswith("Layer 2, head 2:")
    text = "document.querySelector('#attention > div:last-child .text')"
    opened.point(f"{text}.children[0]")
    assert "0 tokens back, with weight 100%" in opened.js(f"{words}.textContent")
    opened.press(text, "ArrowRight")
    shades = opened.js(f"[...{text}.children].map(x => +x.style.getPropertyValue('--a'))")
    assert abs(shades[0] ** 2 + shades[1] ** 2 - 1) < 0.02 and not any(shades[2:])  # squares are weights


def test_the_page_prints_with_every_diff_unfolded(opened):
    opened.js("dispatchEvent(new Event('beforeprint'))")
    assert opened.js("[...document.querySelectorAll('details')].every(x => x.open)")


def test_v0_alone_has_a_page_without_attention(browser, trained, small, tmp_path):
    browser.errors.clear()
    browser.open(page.build([trained[VERSIONS[0]]], small), tmp_path / "page.html")
    assert browser.js("document.getElementById('attention').closest('section').offsetHeight") == 0
    assert browser.js("document.querySelectorAll('#ladder tr').length") == 2 and not browser.errors


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_nothing_is_wider_than_a_phone_or_a_desktop(browser, html, tmp_path, width, scheme):
    browser.errors.clear()
    browser.open(html, tmp_path / "page.html", width, scheme)
    assert browser.js("document.documentElement.scrollWidth") == width
    paper = "rgb(21, 23, 26)" if scheme == "dark" else "rgb(255, 255, 255)"
    assert browser.js("getComputedStyle(document.body).backgroundColor") == paper and not browser.errors

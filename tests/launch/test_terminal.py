"""What a model writes must not command the terminal."""

from tandem.launch.terminal import shown


def test_control_characters_are_replaced_and_text_is_not() -> None:
    assert shown("\x1b]0;title\x07 a\rb\x9b2J\x7f") == "\ufffd]0;title\ufffd a\ufffdb\ufffd2J\ufffd"
    assert shown("line\n\ttab é 漢 🙂\u00a0") == "line\n\ttab é 漢 🙂\u00a0"

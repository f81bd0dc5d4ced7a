"""What the tests of the page do in its panels."""


def set_number(page, name, value):
    """Type a number into a setting, and see its slider follow."""
    slider = page.get_by_label(f"range slider for {name}")
    for _ in range(20):  # what is typed while the panel is still opening is lost
        page.get_by_label(f"number input for {name}").fill(value)
        page.keyboard.press("Tab")
        page.wait_for_timeout(200)
        if slider.input_value() == value:
            return
    raise AssertionError(f"{name} stays at {slider.input_value()}")

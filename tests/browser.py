"""Chromium for tests of pages."""

import shutil
from contextlib import contextmanager


@contextmanager
def chromium(profile, size="1280,1300"):
    """A browser without a window that loads nothing of its own; `profile` is a folder for its files."""
    from selenium import webdriver

    browser_path, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    assert None not in (browser_path, driver_path), "This test needs Chromium: apt-get install chromium{,-driver}"
    options = webdriver.ChromeOptions()
    options.binary_location = browser_path
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += f"disable-component-update disable-sync disable-dev-shm-usage window-size={size}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        yield browser
    finally:
        browser.quit()

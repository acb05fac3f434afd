"""The report in Chromium: `make test-browser`."""

import os
import shutil

import numpy as np
import pytest
import report_workdir

from d2dpm_jax.pipelines import report

pytestmark = pytest.mark.browser


@pytest.fixture(scope='module')
def browser():
  from playwright.sync_api import sync_playwright

  path = os.environ.get('CHROMIUM') or shutil.which('chromium')
  with sync_playwright() as playwright:
    # Without a path: that of `playwright install chromium`.
    opened = playwright.chromium.launch(
      executable_path=path, args=['--no-sandbox']
    )
    yield opened
    opened.close()


@pytest.fixture(scope='module')
def url(few, tmp_path_factory):
  target = tmp_path_factory.mktemp('browser') / 'work'
  report_workdir.write(few, target)
  report.run(None, str(target))
  return (target / 'report.html').as_uri()


@pytest.fixture(params=[1280, 390])
def page(browser, url, request):
  """The report at the width of a desk and of a phone; nothing goes wrong."""
  opened = browser.new_page(viewport={'width': request.param, 'height': 844})
  said = []
  opened.on('console', lambda message: said.append(message.text))
  opened.on('pageerror', lambda error: said.append(str(error)))
  opened.on('request', lambda request: said.append(request.url))
  opened.goto(url)
  yield opened
  assert [text for text in said if not text.startswith(('data:', url))] == []
  opened.close()


def test_images_are_shown_and_nothing_sticks_out(page):
  sizes = page.evaluate(
    "[...document.querySelectorAll('main img')].map(i => i.naturalWidth)"
  )
  assert len(sizes) == 2 + 15 + 4 and min(sizes) > 0
  assert page.evaluate(
    'document.documentElement.scrollWidth <= window.innerWidth'
  )


def _shown(page):
  """Pixels of the left and the right image, and where they are cut."""
  return page.evaluate(
    """() => {
      const draw = image => {
        const canvas = document.createElement('canvas');
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const data = context.getImageData(0, 0, 8, 8).data;
        return [...data].filter((_, i) => i % 4 === 0);
      };
      const right = document.querySelector('.pair .right');
      return [draw(document.querySelector('.pair .left')), draw(right),
              getComputedStyle(right).clipPath];
    }"""
  )


def test_two_samplers_over_each_other(page):
  pictures = report_workdir.comparison()[..., 0]
  left, right, cut = _shown(page)
  np.testing.assert_array_equal(np.reshape(left, (8, 8)), pictures[0, 0])
  np.testing.assert_array_equal(np.reshape(right, (8, 8)), pictures[4, 0])
  assert '50%' in cut
  page.locator('.cell[data-row="2"][data-column="1"]').click()
  page.locator('.at').fill('20')
  left, right, cut = _shown(page)
  np.testing.assert_array_equal(np.reshape(left, (8, 8)), pictures[0, 1])
  np.testing.assert_array_equal(np.reshape(right, (8, 8)), pictures[2, 1])
  assert '20%' in cut
  assert 'W4A8, S-D2: 36.09 dB' in page.locator('.told').inner_text()
  page.locator('.left-row').select_option(label='W4A8, auto')
  page.locator('.column').select_option(index=2)
  left, *_ = _shown(page)
  np.testing.assert_array_equal(np.reshape(left, (8, 8)), pictures[4, 2])


def test_zoom_and_difference(page):
  before = page.locator('.pair').bounding_box()['width']
  page.locator('.zoom').fill('3')
  assert page.locator('.pair').bounding_box()['width'] == pytest.approx(
    3 * before, rel=0.01
  )
  page.locator('.difference').check()
  style = page.evaluate(
    "getComputedStyle(document.querySelector('.right')).mixBlendMode"
  )
  assert style == 'difference'


def test_figures_in_full_size_and_folded_tables(page):
  page.locator('button.figure').first.click()
  assert page.locator('dialog').is_visible()
  page.locator('dialog button').click()
  assert not page.locator('dialog').is_visible()
  fold = page.locator('#layers details').first
  assert not fold.locator('table').is_visible()
  fold.locator('summary').click()
  assert fold.locator('table').is_visible()

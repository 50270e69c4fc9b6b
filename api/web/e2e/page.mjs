// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The browser of the end-to-end test: start, pictures in both colour schemes, accessibility audit, and the few
// things every step does. Chromium is the machine's own.
import { mkdir } from 'node:fs/promises';
import path from 'node:path';

import { AxeBuilder } from '@axe-core/playwright';
import { chromium } from 'playwright-core';

const ARGUMENTS = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];

/** Starts the browser with one page. `problems` collects what went wrong behind the page's back. */
export async function openPage({ url, output }) {
  await mkdir(output, { recursive: true });
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ARGUMENTS });
  const context = await browser.newContext({
    baseURL: url,
    // The node signs its own certificate.
    ignoreHTTPSErrors: true,
    viewport: { width: 1360, height: 860 },
    colorScheme: 'light',
  });
  const page = await context.newPage();
  page.setDefaultTimeout(30_000);
  const problems = [];
  page.on('pageerror', (error) => problems.push(`uncaught in the page: ${error.stack ?? error.message}`));
  page.on('console', (message) => {
    if (message.text().includes('Content Security Policy')) problems.push(message.text());
  });
  return { browser, page, problems, output };
}

/** Keeps a picture in each scheme, and adds what the audit finds to the problems. */
export async function picture({ page, problems, output }, name) {
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' });
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
    // A picture of a fading dialog would be audited as low contrast.
    await page.evaluate(() => Promise.all(document.getAnimations().filter((one) => one.effect?.getComputedTiming().iterations !== Infinity).map((one) => one.finished.catch(() => undefined))));
    await page.screenshot({ path: path.join(output, `${name}-${colorScheme}.png`) });
    const audit = await new AxeBuilder({ page }).analyze();
    for (const violation of audit.violations) {
      const places = violation.nodes.map((node) => node.html.slice(0, 160)).join(' | ');
      problems.push(`accessibility of ${name} (${colorScheme}): ${violation.help}: ${places}`);
    }
  }
  await page.emulateMedia({ colorScheme: 'light', reducedMotion: 'reduce' });
}

/** Polls until `look` gives something; what it last said is in the error. */
export async function eventually(what, seconds, look) {
  const end = Date.now() + seconds * 1000;
  let last;
  for (;;) {
    last = await look();
    if (last) return last;
    if (Date.now() > end) throw new Error(`no ${what} after ${seconds} s`);
    await new Promise((done) => setTimeout(done, 200));
  }
}

/** Opens a tab of the current page. */
export async function openTab(page, name) {
  await page.getByRole('tab', { name, exact: true }).click();
}

/** Waits until the page's heading shows a state of the guest. */
export async function guestState(page, status, seconds) {
  await page.locator(`.atoll-page-head [data-status=${status}]`).waitFor({ timeout: seconds * 1000 });
}

/** What the terminal shows. */
export async function terminalText(page) {
  return page.locator('.xterm-rows > div').evaluateAll((rows) => rows.map((row) => row.textContent).join('\n'));
}

/** Waits for the task whose log is open to end well, then closes it. */
export async function taskEnds(page, seconds) {
  const log = page.getByRole('log', { name: 'Task log' });
  await eventually('end of the task', seconds, async () => {
    const text = await log.innerText();
    if (text.includes('TASK ERROR')) throw new Error(`the task failed:\n${text}`);
    return /TASK (OK|WARNINGS)/.test(text);
  });
  await page.getByRole('button', { name: 'Close the task' }).click();
  await log.waitFor({ state: 'detached' });
}

/**
 * Runs the steps, [name, function of the browser], one after another, against ATOLL_URL with pictures in
 * ATOLL_E2E_OUTPUT. Prints one line a step; ends with 1 at the first that fails, with a picture of the moment.
 */
export async function runSteps(steps) {
  const { ATOLL_URL, ATOLL_USER, ATOLL_PASSWORD, ATOLL_E2E_OUTPUT = 'e2e-output' } = process.env;
  if (!ATOLL_URL || !ATOLL_USER || !ATOLL_PASSWORD) throw new Error('ATOLL_URL, ATOLL_USER and ATOLL_PASSWORD must be set');
  const browser = await openPage({ url: ATOLL_URL, output: ATOLL_E2E_OUTPUT });
  let at = '';
  try {
    for (const [name, step] of steps) {
      at = name;
      const begin = Date.now();
      await step(browser);
      console.log(`ok      ${name} (${((Date.now() - begin) / 1000).toFixed(1)} s)`);
    }
    at = 'nothing behind the scenes';
    if (browser.problems.length > 0) throw new Error([...new Set(browser.problems)].join('\n'));
  } catch (error) {
    console.log(`FAILED  ${at}: ${error.stack ?? error}`);
    if (at !== 'nothing behind the scenes') for (const problem of new Set(browser.problems)) console.log(`        ${problem}`);
    console.log(`        at ${browser.page.url()}`);
    await browser.page.screenshot({ path: path.join(browser.output, 'failed.png') }).catch(() => undefined);
    process.exitCode = 1;
  } finally {
    await browser.browser.close();
  }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A day in the life of a container, by the page alone, against a running node:
//
//   ATOLL_URL, ATOLL_USER, ATOLL_PASSWORD   the node and who signs in
//   ATOLL_TEMPLATE                          file of a container template that the page uploads; without it the
//                                           storage `local` must have one
//   ATOLL_IMAGE                             reference of an OCI image that the node can pull and whose program goes on;
//                                           without it there is no container of an image
//   ATOLL_E2E_OUTPUT                        where the pictures go; default: e2e-output beside the working directory
import path from 'node:path';

import { eventually, guestState, openTab, picture, runSteps, taskEnds, terminalText } from './page.mjs';

const { ATOLL_USER, ATOLL_PASSWORD, ATOLL_TEMPLATE, ATOLL_IMAGE } = process.env;
const ROOT_PASSWORD = 'atoll-e2e-1';
const HOST_NAME = 'e2e-ct';
const IMAGE_FILE = 'e2e-image.tar';

async function signIn({ page, ...rest }) {
  await page.goto('/nodes/nowhere/tasks');
  await page.getByLabel('User').waitFor();
  await picture({ page, ...rest }, '01-sign-in');
  await page.getByLabel('User').fill(ATOLL_USER);
  await page.locator('input[name=password]').fill('wrong');
  await page.getByRole('button', { name: 'Sign in' }).click();
  await page.getByRole('alert').getByText(/authentication failure/).waitFor();
  await page.locator('input[name=password]').fill(ATOLL_PASSWORD);
  await page.getByRole('button', { name: 'Sign in' }).click();
  // The page that was asked for before signing in.
  await page.waitForURL('**/nodes/nowhere/tasks');
  await page.goto('/');
  await page.getByRole('treeitem', { name: /, node, online/ }).first().waitFor();
  await picture({ page, ...rest }, '02-datacenter');
}

async function openStorage(page) {
  await page.getByRole('treeitem', { name: /^local, storage/ }).first().click();
  await page.getByRole('heading', { name: /^Storage local/ }).waitFor();
}

async function uploadTemplate({ page, ...rest }) {
  await openStorage(page);
  if (ATOLL_TEMPLATE) {
    await page.locator('.atoll-page').getByRole('button', { name: 'Upload' }).click();
    const dialog = page.getByRole('dialog');
    await dialog.locator('input[type=file]').setInputFiles(ATOLL_TEMPLATE);
    await dialog.getByRole('button', { name: 'Upload' }).click();
    await taskEnds(page, 120);
    await page.getByRole('cell', { name: `local:vztmpl/${path.basename(ATOLL_TEMPLATE)}`, exact: true }).waitFor();
  }
  await picture({ page, ...rest }, '03-storage');
}

/** Opens the wizard and waits until it knows a free ID. */
async function openWizard(page) {
  await page.keyboard.press('Shift+C');
  const dialog = page.getByRole('dialog');
  const id = await eventually('free ID', 20, async () => {
    const field = dialog.getByLabel(/^ID/);
    return (await field.count()) > 0 && (await field.inputValue());
  });
  return { dialog, next: dialog.getByRole('button', { name: 'Next' }), id };
}

async function chooseTemplate(page, dialog, name) {
  const template = dialog.getByRole('combobox', { name: /^Template/ });
  await eventually('template', 20, () => template.inputValue());
  if (!name) return;
  await template.click();
  await page.getByRole('option', { name: `local:vztmpl/${name}` }).click();
}

async function createContainer(browser) {
  const { page } = browser;
  const { dialog, next, id } = await openWizard(page);
  await dialog.getByLabel('Host name').fill('not a host name');
  await next.click();
  await dialog.getByText(/as in a DNS name/).waitFor();
  await dialog.getByLabel('Host name').fill(HOST_NAME);
  await dialog.getByLabel('Password of root', { exact: true }).fill(ROOT_PASSWORD);
  await picture(browser, '04-wizard');
  await next.click();
  await chooseTemplate(page, dialog, ATOLL_TEMPLATE && path.basename(ATOLL_TEMPLATE));
  await next.click();
  await dialog.getByLabel(/^Size/).fill('1');
  await next.click();
  await dialog.getByLabel('Memory (MiB)').fill('256');
  await next.click();
  await dialog.getByRole('combobox', { name: 'Bridge' }).waitFor();
  await next.click();
  await dialog.getByRole('row', { name: /^Host name/ }).getByText(HOST_NAME).waitFor();
  await dialog.getByLabel('Start it when it is created').uncheck();
  await picture(browser, '05-wizard-confirm');
  await dialog.getByRole('button', { name: 'Create' }).click();
  await page.getByRole('log', { name: 'Task log' }).waitFor();
  await picture(browser, '06-task');
  await taskEnds(page, 180);
  await page.waitForURL(`**/guests/${id}`);
  await guestState(page, 'stopped', 20);
  browser.id = id;
}

async function startIt(browser) {
  await browser.page.getByRole('button', { name: 'Start', exact: true }).click();
  await guestState(browser.page, 'running', 60);
  await browser.page.getByRole('img', { name: /^CPU, latest/ }).waitFor();
  await eventually('live sample', 20, async () => !/not measured/.test((await browser.page.getByRole('img', { name: /^Memory, latest/ }).getAttribute('aria-label')) ?? ''));
  await picture(browser, '07-summary');
}

/** Signs in at the console if it asks, then types `id` and waits for its answer. */
async function talkToConsole(browser) {
  const { page } = browser;
  await openTab(page, 'Console');
  await page.locator('[role=status][data-phase=open]').waitFor({ timeout: 30_000 });
  const screen = page.locator('.atoll-terminal');
  const says = (what, pattern, seconds) => eventually(`${what} in the console`, seconds, async () => pattern.test(await terminalText(page)));
  const type = async (text) => {
    await screen.click();
    await page.keyboard.type(`${text}\n`);
  };
  await says('prompt', /(login:|[#$]) ?\s*$/, 90);
  if (/login:\s*$/.test(await terminalText(page))) {
    await type('root');
    await says('question for the password', /[Pp]assword:\s*$/, 30);
    await type(ROOT_PASSWORD);
    await says('shell', /# ?\s*$/, 60);
  }
  await type('id');
  await says('answer to id', /uid=0\(root\) gid=0\(root\)/, 20);
  await picture(browser, '08-console');
  await page.goto(`/console/${browser.id}`);
  await says('backlog in a window of its own', /uid=0\(root\)/, 30);
  await page.goto(`/guests/${browser.id}`);
}

async function changeConfig(browser) {
  const { page } = browser;
  await openTab(page, 'Resources');
  await page.getByRole('button', { name: 'Edit: Memory (MiB)' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Memory (MiB)').fill('1');
  await dialog.getByRole('button', { name: 'Save' }).click();
  await dialog.getByText(/^At least/).waitFor();
  await dialog.getByLabel('Memory (MiB)').fill('320');
  await dialog.getByRole('button', { name: 'Save' }).click();
  await dialog.waitFor({ state: 'detached' });
  await page.getByRole('row', { name: /^Memory \(MiB\)/ }).getByText('320').waitFor();
  await picture(browser, '09-resources');
  await openTab(page, 'Options');
  await page.getByRole('row', { name: /^Host name/ }).waitFor();
  await picture(browser, '10-options');
}

async function stopIt(browser) {
  const { page } = browser;
  await page.getByRole('button', { name: 'More' }).click();
  await page.getByRole('menuitem', { name: 'Stop' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Stop' }).click();
  await guestState(page, 'stopped', 60);
}

async function openDeletion({ page, id }) {
  await page.getByRole('button', { name: 'More' }).click();
  await page.getByRole('menuitem', { name: 'Delete…' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel(`Type ${id} to confirm`).fill(id);
  return dialog;
}

async function confirmDeletion({ page, id }, dialog) {
  await dialog.getByRole('button', { name: 'Delete' }).click();
  // Where the page goes by itself: the next step must not be overtaken by that.
  await page.waitForURL('**/nodes/*');
  await page.getByRole('treeitem', { name: new RegExp(`^${id} `) }).waitFor({ state: 'detached', timeout: 60_000 });
}

async function deleteIt(browser) {
  const dialog = await openDeletion(browser);
  await picture(browser, '11-delete');
  await confirmDeletion(browser, dialog);
}

async function deleteThat(browser) {
  await confirmDeletion(browser, await openDeletion(browser));
}

async function pullImage(browser) {
  const { page } = browser;
  await openStorage(page);
  await page.locator('.atoll-page').getByRole('button', { name: 'Pull an image' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel(/^Reference/).fill(ATOLL_IMAGE);
  await dialog.getByLabel('File name').fill(IMAGE_FILE);
  await picture(browser, '12-pull');
  await dialog.getByRole('button', { name: 'Pull' }).click();
  await taskEnds(page, 120);
  await page.getByRole('cell', { name: `local:vztmpl/${IMAGE_FILE}`, exact: true }).waitFor();
}

/** From the image to the running container, in one go: what is not asked for here has been tried before. */
async function createOfImage(browser) {
  const { page } = browser;
  const { dialog, next, id } = await openWizard(page);
  await next.click();
  await chooseTemplate(page, dialog, IMAGE_FILE);
  await next.click();
  await dialog.getByLabel(/^Size/).fill('1');
  await dialog.getByRole('button', { name: 'Confirm' }).click();
  await dialog.getByRole('row', { name: /^Template/ }).getByText(IMAGE_FILE).waitFor();
  await dialog.getByRole('button', { name: 'Create' }).click();
  await page.getByRole('log', { name: 'Task log' }).waitFor();
  await taskEnds(page, 180);
  await page.waitForURL(`**/guests/${id}`);
  await guestState(page, 'running', 60);
  await openTab(page, 'Options');
  await page.getByRole('row', { name: /^image/i }).getByText(ATOLL_IMAGE).waitFor();
  browser.id = id;
}

/** Search, arrow keys, and the tasks of all this. */
async function useKeyboard(browser) {
  const { page } = browser;
  await page.goto('/');
  await page.getByRole('treeitem', { name: /, node, online/ }).first().waitFor();
  await page.keyboard.press('/');
  await page.keyboard.type('local');
  await page.keyboard.press('Enter');
  await page.getByRole('heading', { name: /^Storage local/ }).waitFor();
  await page.keyboard.press('ArrowDown');
  await page.keyboard.press('Home');
  await page.keyboard.press('ArrowDown');
  await page.keyboard.press('Enter');
  await page.getByRole('heading', { name: /^Node / }).waitFor();
  await page.getByRole('img', { name: /^CPU, latest/ }).waitFor();
  await picture(browser, '13-node');
  await openTab(page, 'Tasks');
  await page.locator('.atoll-tab').getByRole('button', { name: new RegExp(`Container ${browser.id}: delete`) }).first().waitFor();
  await page.keyboard.press('?');
  await page.getByRole('dialog', { name: 'Keyboard shortcuts' }).waitFor();
  await picture(browser, '14-shortcuts');
}

async function signOut({ page }) {
  await page.keyboard.press('Escape');
  await page.getByRole('button', { name: ATOLL_USER }).click();
  await page.getByRole('menuitem', { name: 'Sign out' }).click();
  await page.waitForURL('**/signin');
  await page.goto('/datacenter/guests');
  await page.waitForURL('**/signin?next=*');
}

const OF_IMAGE = [
  ['pull an image', pullImage],
  ['create a container of it that runs', createOfImage],
  ['stop that', stopIt],
  ['delete that', deleteThat],
];

const STEPS = [
  ['sign in', signIn],
  ['upload a template', uploadTemplate],
  ['create a container', createContainer],
  ['start it', startIt],
  ['talk to its console', talkToConsole],
  ['change its configuration', changeConfig],
  ['stop it', stopIt],
  ['delete it', deleteIt],
  ...(ATOLL_IMAGE ? OF_IMAGE : []),
  ['use the keyboard', useKeyboard],
  ['sign out', signOut],
];

await runSteps(STEPS);

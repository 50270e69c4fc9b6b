// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A day in the life of a virtual machine, by the page alone, against a running node that has the probe guest as
// `local:snippets/probe`: ATOLL_URL, ATOLL_USER, ATOLL_PASSWORD and ATOLL_E2E_OUTPUT as in run.mjs.
import { createServer } from 'node:http';

import { eventually, guestState, openTab, picture, runSteps, taskEnds, terminalText } from './page.mjs';

const { ATOLL_USER, ATOLL_PASSWORD } = process.env;
const NAME = 'e2e-vm';
const DISK = 'Disk (SCSI) (scsi0)';

async function signIn({ page }) {
  await page.goto('/');
  await page.getByLabel('User').fill(ATOLL_USER);
  await page.locator('input[name=password]').fill(ATOLL_PASSWORD);
  await page.getByRole('button', { name: 'Sign in' }).click();
  await page.getByRole('treeitem', { name: /, node, online/ }).first().waitFor();
}

/** The node fetches a file from an address, and says in words when it cannot. */
async function download(browser) {
  const { page } = browser;
  const server = createServer((request, response) => {
    response.statusCode = request.url === '/small.iso' ? 200 : 404;
    response.end('not much of an image'.padEnd(2048));
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  server.unref(); // A step that fails ends the script.
  const url = (file) => `http://127.0.0.1:${server.address().port}/${file}`;
  await page.getByRole('treeitem', { name: /^local, storage/ }).first().click();
  await page.getByRole('heading', { name: /^Storage local/ }).waitFor();
  const fetch = async (file) => {
    await page.locator('.atoll-page').getByRole('button', { name: 'Download from URL' }).click();
    const dialog = page.getByRole('dialog');
    await dialog.getByLabel('URL').fill(url(file));
    await dialog.getByRole('button', { name: 'Download' }).click();
  };
  await fetch('absent.iso');
  await page.getByRole('log', { name: 'Task log' }).getByText(/TASK ERROR: .*404/).waitFor();
  await page.getByRole('button', { name: 'Close the task' }).click();
  await fetch('small.iso');
  await taskEnds(page, 30);
  await page.getByRole('cell', { name: 'local:iso/small.iso', exact: true }).waitFor();
  server.close();
}

async function createMachine(browser) {
  const { page } = browser;
  await page.keyboard.press('Shift+V');
  const dialog = page.getByRole('dialog');
  const next = dialog.getByRole('button', { name: 'Next' });
  const id = await eventually('free ID', 20, async () => {
    const field = dialog.getByLabel(/^ID/);
    return (await field.count()) > 0 && (await field.inputValue());
  });
  await dialog.getByLabel('Name').fill(NAME);
  await next.click();
  await dialog.getByRole('combobox', { name: /^Firmware/ }).waitFor();
  const kernel = dialog.getByRole('combobox', { name: /^Kernel/ });
  await kernel.click();
  await page.getByRole('option', { name: 'local:snippets/probe' }).click();
  await dialog.getByLabel('Kernel command line').fill('stay');
  await dialog.getByRole('combobox', { name: /^Firmware/ }).waitFor({ state: 'detached' });
  await next.click();
  await dialog.getByLabel(/^Size/).fill('1');
  await dialog.getByRole('combobox', { name: /^Format/ }).click();
  await page.getByRole('option', { name: 'qcow2' }).click();
  await next.click();
  await dialog.getByLabel('Memory (MiB)').fill('128');
  await next.click();
  await dialog.getByRole('combobox', { name: 'Bridge' }).waitFor();
  await next.click();
  await dialog.getByRole('row', { name: /^Name/ }).getByText(NAME).waitFor();
  await picture(browser, '21-machine-wizard');
  await dialog.getByRole('button', { name: 'Create' }).click();
  await taskEnds(page, 60);
  await page.waitForURL(`**/guests/${id}`);
  await guestState(page, 'running', 60);
  browser.id = id;
}

async function typeIntoConsole({ page }) {
  await openTab(page, 'Console');
  await page.locator('[role=status][data-phase=open]').waitFor({ timeout: 30_000 });
  await eventually('prompt', 30, async () => /probe>/.test(await terminalText(page)));
  await page.locator('.atoll-terminal').click();
  await page.keyboard.type('id\n');
  await eventually('answer to id', 20, async () => /atoll probe guest/.test(await terminalText(page)));
}

async function growDisk(browser) {
  const { page } = browser;
  await openTab(page, 'Hardware');
  await page.getByRole('button', { name: `Resize: ${DISK}` }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Add (GiB)').fill('-1');
  await dialog.getByText('A number above zero is needed.').waitFor();
  await dialog.getByLabel('Add (GiB)').fill('1');
  await dialog.getByRole('button', { name: 'Resize' }).click();
  await taskEnds(page, 60);
  await page.getByRole('row', { name: /scsi0/ }).getByText(/qcow2,.*size=2G/).waitFor();
}

/** A disc goes into the drive while the machine runs. */
async function changeDisc(browser) {
  const { page } = browser;
  const drive = page.getByRole('row', { name: /^CD-ROM drive \(IDE\) \(ide2\)/ });
  const choose = async (disc) => {
    await page.getByRole('button', { name: 'Edit: CD-ROM drive (IDE) (ide2)' }).click();
    const dialog = page.getByRole('dialog');
    await dialog.getByRole('combobox', { name: /^Disc/ }).click();
    await page.getByRole('option', { name: disc }).click();
    await picture(browser, '24-disc');
    await dialog.getByRole('button', { name: 'Save' }).click();
    await dialog.waitFor({ state: 'detached' });
  };
  await choose('local:iso/small.iso');
  await drive.getByText(/^local:iso\/small.iso,media=cdrom/).waitFor();
  await choose('No disc');
  await drive.getByText('none,media=cdrom').waitFor();
  await drive.getByText(/at the next start/).waitFor({ state: 'detached' });
}

/** The network card is tried first from the next start on. */
async function orderBoot(browser) {
  const { page } = browser;
  await openTab(page, 'Options');
  await page.getByRole('button', { name: 'Edit: Boot order' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByRole('button', { name: 'Up: net0' }).click();
  await dialog.getByRole('checkbox', { name: /ide2/ }).uncheck();
  await picture(browser, '25-boot-order');
  await dialog.getByRole('button', { name: 'Save' }).click();
  await page.getByRole('row', { name: /^Boot order/ }).getByText('order=net0;scsi0 at the next start').waitFor();
  await openTab(page, 'Hardware');
}

async function changeAndRevert({ page }) {
  await page.getByRole('button', { name: 'Edit: Memory (MiB)' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Memory (MiB)').fill('192');
  await dialog.getByRole('button', { name: 'Save' }).click();
  const row = page.getByRole('row', { name: /^Memory \(MiB\)/ });
  await row.getByText('192 at the next start').waitFor();
  await page.getByRole('button', { name: 'Revert: Memory (MiB)' }).click();
  await row.getByText('192 at the next start').waitFor({ state: 'detached' });
  await row.getByText('128').waitFor();
}

async function takeNotes({ page }) {
  await openTab(page, 'Summary');
  await page.getByRole('button', { name: 'Edit', exact: true }).click();
  await page.getByRole('textbox', { name: 'Notes' }).fill('made by the page');
  await page.getByRole('button', { name: 'Save' }).click();
  await page.getByText('made by the page').waitFor();
}

async function takeSnapshot(browser) {
  const { page, id } = browser;
  // The address of a tab is one that can be kept.
  await page.goto(`/guests/${id}/snapshots`);
  await page.getByRole('button', { name: 'Take snapshot' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Name').fill('1st');
  await dialog.getByText(/^A letter first/).waitFor();
  await dialog.getByLabel('Name').fill('first');
  await dialog.getByLabel('Notes').fill('before all else');
  await dialog.getByLabel('Name').press('Enter');
  await taskEnds(page, 60);
  await page.getByRole('row', { name: /^first/ }).getByText(/before all else/).waitFor();
  await guestState(page, 'running', 20);
  await picture(browser, '22-snapshots');
}

/** A snapshot with the memory, and back to it: the guest goes on. */
async function keepTheMemory({ page }) {
  await page.getByRole('button', { name: 'Take snapshot' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByLabel('Name').fill('warm');
  await dialog.getByLabel('Keep the memory, too').check();
  await dialog.getByLabel('Name').press('Enter');
  await taskEnds(page, 60);
  await page.getByRole('button', { name: 'Roll back: warm' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Roll back' }).click();
  await taskEnds(page, 60);
  await guestState(page, 'running', 20);
  await page.getByRole('button', { name: 'Delete: warm' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Delete' }).click();
  await taskEnds(page, 60);
}

async function suspendToDisk({ page }) {
  await page.getByRole('button', { name: 'More' }).click();
  await page.getByRole('menuitem', { name: 'Suspend to disk' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Suspend to disk' }).click();
  await guestState(page, 'stopped', 60);
  await page.getByRole('button', { name: 'Start', exact: true }).click();
  await guestState(page, 'running', 60);
}

async function goBack({ page }) {
  await page.getByRole('button', { name: 'Roll back: first' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Roll back' }).click();
  await taskEnds(page, 60);
  await guestState(page, 'stopped', 20);
  await page.getByRole('button', { name: 'Delete: first' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Delete' }).click();
  await taskEnds(page, 60);
  await page.getByText('No snapshots yet').waitFor();
}

async function cloneIt(browser) {
  const { page, id } = browser;
  await page.getByRole('button', { name: 'More' }).click();
  await page.getByRole('menuitem', { name: 'Clone…' }).click();
  const dialog = page.getByRole('dialog');
  const copy = await eventually('free ID', 20, () => dialog.getByLabel('ID of the clone').inputValue());
  await dialog.getByLabel('Name').fill('e2e-copy');
  await dialog.getByRole('button', { name: 'Clone' }).click();
  await taskEnds(page, 60);
  await page.goto(`/guests/${copy}`);
  await guestState(page, 'stopped', 20);
  for (const each of [copy, id]) {
    await page.goto(`/guests/${each}`);
    await page.getByRole('button', { name: 'More' }).click();
    await page.getByRole('menuitem', { name: 'Delete…' }).click();
    await page.getByRole('dialog').getByLabel(`Type ${each} to confirm`).fill(each);
    await page.getByRole('dialog').getByRole('button', { name: 'Delete' }).click();
    await page.getByRole('treeitem', { name: new RegExp(`^${each} `) }).waitFor({ state: 'detached', timeout: 60_000 });
  }
}

async function openShell(browser) {
  const { page } = browser;
  await page.goto('/nodes/n1/shell');
  await page.locator('[role=status][data-phase=open]').waitFor({ timeout: 30_000 });
  await eventually('login', 30, async () => /login:/.test(await terminalText(page)));
  await picture(browser, '23-shell');
}

await runSteps([
  ['sign in', signIn],
  ['have the node download a file', download],
  ['create a machine', createMachine],
  ['type into its console', typeIntoConsole],
  ['grow its disk', growDisk],
  ['change its disc', changeDisc],
  ['order what it boots', orderBoot],
  ['change it and revert that', changeAndRevert],
  ['note something', takeNotes],
  ['take a snapshot', takeSnapshot],
  ['keep the memory, too', keepTheMemory],
  ['suspend it to disk', suspendToDisk],
  ['go back to it', goBack],
  ['clone it, and delete both', cloneIt],
  ['open a shell of the node', openShell],
]);

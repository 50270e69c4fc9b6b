// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { screen, waitFor } from '@testing-library/react';
import { userEvent } from '@testing-library/user-event';
import { expect, it } from 'vitest';

import type { Guest } from '../api/types';
import { renderPage, serve } from '../test/render';
import { GuestActions } from './GuestActions';

const GUEST: Guest = { id: 'lxc/101', type: 'lxc', vmid: 101, node: 'n1', name: 'db', status: 'stopped' };

it('deletes only when the number of the guest is typed', async () => {
  const changes = serve({
    'GET /nodes/n1/lxc/101/status/current': () => ({ body: { data: { vmid: 101, status: 'stopped' } } }),
    'DELETE /nodes/n1/lxc/101': () => ({ body: { data: 'UPID:n1:1:2:3:vzdestroy:101:root@pam:' } }),
  });
  const user = userEvent.setup();
  renderPage(<GuestActions guest={GUEST} />);

  await user.click(await screen.findByRole('button', { name: 'More' }));
  await user.click(await screen.findByRole('menuitem', { name: 'Delete…' }));
  const confirm = await screen.findByRole('button', { name: 'Delete' });
  expect((confirm as HTMLButtonElement).disabled).toBe(true);
  await user.type(screen.getByLabelText('Type 101 to confirm'), '101');
  await user.click(confirm);
  await waitFor(() => expect(changes.map((change) => `${change.method} ${change.path}`)).toEqual(['DELETE /nodes/n1/lxc/101']));
}, 20_000);

it('offers a stopped guest only its start', async () => {
  serve({ 'GET /nodes/n1/lxc/101/status/current': () => ({ body: { data: { vmid: 101, status: 'stopped' } } }) });
  renderPage(<GuestActions guest={GUEST} />);
  const start = (await screen.findByRole('button', { name: 'Start' })) as HTMLButtonElement;
  expect(start.disabled).toBe(false);
  expect((screen.getByRole('button', { name: 'Shut down' }) as HTMLButtonElement).disabled).toBe(true);
});

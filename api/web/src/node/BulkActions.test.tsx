// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { screen, waitFor } from '@testing-library/react';
import { userEvent } from '@testing-library/user-event';
import { expect, it } from 'vitest';

import { renderPage, serve } from '../test/render';
import { BulkActions } from './BulkActions';

const UPID = 'UPID:n1:1:2:3:startall::root@pam:';

function show() {
  const changes = serve({
    'POST /nodes/n1/startall': () => ({ body: { data: UPID } }),
    'POST /nodes/n1/stopall': () => ({ body: { data: UPID } }),
  });
  renderPage(<BulkActions node="n1" />);
  return { changes, user: userEvent.setup() };
}

it('starts the guests of a node, also those without onboot when that is asked for', async () => {
  const { changes, user } = show();
  await user.click(await screen.findByRole('button', { name: 'All guests' }));
  await user.click(await screen.findByRole('menuitem', { name: 'Start all…' }));
  await user.click(await screen.findByRole('checkbox', { name: /Also those/ }));
  expect(changes).toHaveLength(0);
  await user.click(screen.getByRole('button', { name: 'Start all' }));
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]).toMatchObject({ path: '/nodes/n1/startall', parameters: { force: '1' } });
});

it('shuts them down after a question', async () => {
  const { changes, user } = show();
  await user.click(await screen.findByRole('button', { name: 'All guests' }));
  await user.click(await screen.findByRole('menuitem', { name: 'Shut down all…' }));
  await user.click(await screen.findByRole('button', { name: 'Shut down all' }));
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]).toMatchObject({ path: '/nodes/n1/stopall', parameters: { 'force-stop': '1' } });
});

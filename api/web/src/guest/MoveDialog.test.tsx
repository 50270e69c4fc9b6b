// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { screen, waitFor } from '@testing-library/react';
import { userEvent } from '@testing-library/user-event';
import { expect, it } from 'vitest';

import type { Guest } from '../api/types';
import { renderPage, serve } from '../test/render';
import { MoveDialog } from './MoveDialog';

const VM: Guest = { id: 'qemu/100', type: 'qemu', vmid: 100, node: 'n1', name: 'web', status: 'running' };
const CONTAINER: Guest = { id: 'lxc/101', type: 'lxc', vmid: 101, node: 'n1', name: 'db', status: 'stopped' };
const UPID = 'UPID:n1:1:2:3:qmmove:100:root@pam:';
const STORAGES = [
  { storage: 'local', type: 'dir', content: 'iso,vztmpl', active: 1 },
  { storage: 'fast', type: 'dir', content: 'images,rootdir', active: 1 },
];

function show(guest: Guest, disk: string) {
  const changes = serve({
    'GET /nodes/n1/storage': () => ({ body: { data: STORAGES } }),
    'POST /nodes/n1/qemu/100/move_disk': () => ({ body: { data: UPID } }),
    'POST /nodes/n1/lxc/101/move_volume': () => ({ body: { data: UPID } }),
  });
  renderPage(<MoveDialog guest={guest} disk={disk} digest="abc" onClose={() => undefined} />);
  return { changes, user: userEvent.setup() };
}

it('moves a disk to a storage that takes images', async () => {
  const { changes, user } = show(VM, 'scsi0');
  const button = await screen.findByRole('button', { name: 'Move' });
  expect(button).toHaveProperty('disabled', true);
  await user.click(screen.getByRole('combobox', { name: 'To storage' }));
  expect(screen.queryByRole('option', { name: 'local' })).toBeNull();
  await user.click(await screen.findByRole('option', { name: 'fast' }));
  await user.click(button);
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]?.parameters).toEqual({ disk: 'scsi0', storage: 'fast', delete: '0', digest: 'abc' });
});

it('gives a disk another format where it is', async () => {
  const { changes, user } = show(VM, 'scsi0');
  await user.click(await screen.findByRole('combobox', { name: 'Format' }));
  await user.click(await screen.findByRole('option', { name: 'qcow2' }));
  await user.click(screen.getByRole('checkbox', { name: /Remove the old volume/ }));
  await user.click(screen.getByRole('button', { name: 'Move' }));
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]?.parameters).toEqual({ disk: 'scsi0', format: 'qcow2', delete: '1', digest: 'abc' });
});

it('moves a volume of a container, which has no format', async () => {
  const { changes, user } = show(CONTAINER, 'rootfs');
  await user.click(await screen.findByRole('combobox', { name: 'To storage' }));
  await user.click(await screen.findByRole('option', { name: 'fast' }));
  expect(screen.queryByRole('combobox', { name: 'Format' })).toBeNull();
  await user.click(screen.getByRole('button', { name: 'Move' }));
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]?.path).toBe('/nodes/n1/lxc/101/move_volume');
  expect(changes[0]?.parameters).toEqual({ volume: 'rootfs', storage: 'fast', delete: '0', digest: 'abc' });
});

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { screen, waitFor } from '@testing-library/react';
import { userEvent } from '@testing-library/user-event';
import { expect, it } from 'vitest';

import { renderPage, serve } from '../test/render';
import { Wizard } from './Wizard';

const SCHEMA = {
  parameters: {
    vmid: { type: 'integer', minimum: 100, format: 'pve-vmid' },
    hostname: { type: 'string', format: 'dns-name', optional: 1 },
    ostemplate: { type: 'string' },
    start: { type: 'boolean', optional: 1 },
    rootfs: { type: 'string', optional: 1, default_key: 'volume', format: { volume: { type: 'string' } } },
  },
};

it('offers what the schema has, checks by it, and shows what the server refuses at the field', async () => {
  const changes = serve({
    'GET /atoll/schema': () => ({ body: { data: SCHEMA } }),
    'GET /cluster/resources': () => ({ body: { data: [{ id: 'node/n1', type: 'node', node: 'n1', status: 'online' }] } }),
    'GET /cluster/nextid': () => ({ body: { data: '101' } }),
    'GET /nodes/n1/storage': () => ({ body: { data: [{ storage: 'local', type: 'dir', content: 'rootdir,vztmpl', active: 1 }] } }),
    'GET /nodes/n1/storage/local/content': () => ({ body: { data: [{ volid: 'local:vztmpl/debian.tar.zst', content: 'vztmpl', format: 'tzst', size: 1 }] } }),
    'POST /nodes/n1/lxc': () => ({ status: 400, body: { message: 'Parameter verification failed.', errors: { vmid: 'VM 101 already exists' } } }),
  });
  const user = userEvent.setup();
  renderPage(<Wizard kind="ct" node={undefined} onClose={() => undefined} />);

  await waitFor(() => expect((screen.getByLabelText(/^ID/) as HTMLInputElement).value).toBe('101'));
  expect(screen.queryByLabelText('Password of root')).toBeNull();
  await user.type(screen.getByLabelText('Host name'), 'no spaces');
  await user.click(screen.getByRole('button', { name: 'Next' }));
  expect(screen.getByText(/as in a DNS name/)).toBeTruthy();
  await user.clear(screen.getByLabelText('Host name'));
  await user.type(screen.getByLabelText('Host name'), 'db');
  for (let step = 0; step < 3; step += 1) await user.click(screen.getByRole('button', { name: 'Next' }));
  await user.click(await screen.findByRole('button', { name: 'Create' }));

  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]?.parameters).toEqual({ vmid: '101', hostname: 'db', ostemplate: 'local:vztmpl/debian.tar.zst', rootfs: 'local:8', start: '1' });
  expect(await screen.findByText(/VM 101 already exists/)).toBeTruthy();
  await user.click(screen.getByRole('button', { name: /General/ }));
  expect(screen.getByText('VM 101 already exists')).toBeTruthy();
}, 20_000);

it('lets the host ask for an address, as long as one is asked for', async () => {
  const card = { bridge: { type: 'string' }, name: { type: 'string' }, ip: { type: 'string' }, 'host-managed': { type: 'boolean', optional: 1 } } as const;
  const { vmid, ostemplate, rootfs } = SCHEMA.parameters;
  const changes = serve({
    'GET /atoll/schema': () => ({ body: { data: { parameters: { vmid, ostemplate, rootfs, 'net[n]': { type: 'string', optional: 1, format: card } } } } }),
    'GET /cluster/resources': () => ({ body: { data: [{ id: 'node/n1', type: 'node', node: 'n1', status: 'online' }] } }),
    'GET /cluster/nextid': () => ({ body: { data: '101' } }),
    'GET /nodes/n1/network': () => ({ body: { data: [{ iface: 'vmbr0', type: 'bridge', active: 1 }] } }),
    'GET /nodes/n1/storage': () => ({ body: { data: [{ storage: 'local', type: 'dir', content: 'rootdir,vztmpl', active: 1 }] } }),
    'GET /nodes/n1/storage/local/content': () => ({ body: { data: [{ volid: 'local:vztmpl/app.tar', content: 'vztmpl', format: 'tar', size: 1 }] } }),
    'POST /nodes/n1/lxc': () => ({ status: 400, body: { message: 'not now' } }),
  });
  const user = userEvent.setup();
  renderPage(<Wizard kind="ct" node={undefined} onClose={() => undefined} />);

  const sent = async (address: string) => {
    await user.click(await screen.findByRole('button', { name: /Network/ }));
    const field = screen.getByLabelText(/^IPv4/, { selector: 'input' });
    await user.clear(field);
    await user.type(field, address);
    if (address === 'dhcp') await user.click(screen.getByLabelText('The host asks for the address'));
    else expect(screen.queryByLabelText('The host asks for the address')).toBeNull();
    await user.click(screen.getByRole('button', { name: /Confirm|Summary|Finish/ }));
    const before = changes.length;
    await user.click(await screen.findByRole('button', { name: 'Create' }));
    await waitFor(() => expect(changes).toHaveLength(before + 1));
    return changes[before]?.parameters['net0'];
  };
  await waitFor(() => expect((screen.getByLabelText(/^ID/) as HTMLInputElement).value).toBe('101'));
  expect(await sent('dhcp')).toBe('bridge=vmbr0,name=eth0,ip=dhcp,host-managed=1');
  expect(await sent('10.0.0.2/24')).toBe('bridge=vmbr0,name=eth0,ip=10.0.0.2/24');
}, 60_000);

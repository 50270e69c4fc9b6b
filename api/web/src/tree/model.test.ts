// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { describe, expect, it } from 'vitest';

import type { Resource } from '../api/types';
import { keyMove, rows } from './model';

const RESOURCES: Resource[] = [
  { id: 'storage/n1/local', type: 'storage', node: 'n1', storage: 'local', status: 'available' },
  { id: 'qemu/110', type: 'qemu', node: 'n1', vmid: 110, name: 'web', status: 'stopped' },
  { id: 'lxc/102', type: 'lxc', node: 'n1', vmid: 102, name: 'db', status: 'running' },
  { id: 'node/n2', type: 'node', node: 'n2', status: 'offline' },
  { id: 'node/n1', type: 'node', node: 'n1', status: 'online' },
];
const ids = (filter: string, collapsed: string[] = []) => rows(RESOURCES, filter, new Set(collapsed)).map((row) => row.id);

describe('rows of the tree', () => {
  it('are nodes in order, guests by number, then storages', () => {
    expect(ids('')).toEqual(['datacenter', 'node/n1', 'lxc/102', 'qemu/110', 'storage/n1/local', 'node/n2']);
  });

  it('leave out what is below a collapsed node, except while searching', () => {
    expect(ids('', ['node/n1'])).toEqual(['datacenter', 'node/n1', 'node/n2']);
    expect(ids('db', ['node/n1'])).toEqual(['datacenter', 'node/n1', 'lxc/102']);
  });

  it('match all words, whatever they are about', () => {
    expect(ids('ct running')).toEqual(['datacenter', 'node/n1', 'lxc/102']);
    expect(ids('110 running')).toEqual(['datacenter']);
  });
});

describe('keys of the tree', () => {
  const list = rows(RESOURCES, '', new Set(['node/n2']));
  it('move, open and close as the ARIA pattern has it', () => {
    expect(keyMove('ArrowDown', list, 0)).toEqual({ to: 1 });
    expect(keyMove('ArrowUp', list, 0)).toEqual({ to: 0 });
    expect(keyMove('ArrowLeft', list, 2)).toEqual({ to: 1 });
    expect(keyMove('ArrowLeft', list, 1)).toEqual({ toggle: 'node/n1' });
    expect(keyMove('ArrowRight', list, 5)).toEqual({ toggle: 'node/n2' });
    expect(keyMove('ArrowRight', list, 2)).toEqual({ to: 2 });
    expect(keyMove('Enter', list, 3)).toEqual({ open: 3 });
    expect(keyMove('x', list, 3)).toBeNull();
  });
});

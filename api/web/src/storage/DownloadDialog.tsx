// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Has the node fetch a file from an address into a storage.
import { Select, TextInput } from '@mantine/core';
import { useState } from 'react';

import { call, path } from '../api/client';
import { ActionDialog } from '../app/ActionDialog';
import { CONTENT_NAMES } from './ContentTab';
import { guessContent } from './UploadDialog';

interface DownloadProps {
  node: string;
  storage: string;
  contents: string[];
  onClose: () => void;
}

function fileName(url: string): string {
  try {
    return decodeURIComponent(new URL(url).pathname.split('/').pop() ?? '');
  } catch {
    return '';
  }
}

export function DownloadDialog({ node, storage, contents, onClose }: DownloadProps) {
  const [url, setUrl] = useState('');
  const [name, setName] = useState<string | null>(null);
  const [content, setContent] = useState<string | null>(null);
  const filename = name ?? fileName(url);
  const chosen = content ?? guessContent(filename, contents) ?? null;
  const download = () => call<string>('POST', path`/nodes/${node}/storage/${storage}/download-url`, { url, filename, content: chosen ?? '' });
  return (
    <ActionDialog title={`Download to ${storage}`} verb="Download" act={download} onClose={onClose} valid={url !== '' && filename !== ''} size="md">
      {(errors) => (
        <>
          <TextInput label="URL" type="url" required data-autofocus value={url} error={errors['url']} onChange={(event) => setUrl(event.currentTarget.value)} />
          <TextInput label="File name" required value={filename} error={errors['filename']} onChange={(event) => setName(event.currentTarget.value)} />
          <Select label="Content" allowDeselect={false} value={chosen} error={errors['content']} onChange={setContent} data={contents.map((kind) => ({ value: kind, label: CONTENT_NAMES[kind] ?? kind }))} />
        </>
      )}
    </ActionDialog>
  );
}
